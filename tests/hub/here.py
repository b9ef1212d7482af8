"""A Hub for the client in this process: what names the Hub is exchanged, the client is the real one."""

import functools

import pytest
from huggingface_hub import HfApi, constants, snapshot_download

from .loopback import LoopbackHub

# The client's own upload of a file, with httpx.
UPLOADS_WARN = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def use_here(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushes and the mixin's downloads go to `hub`; the rest of the package does not."""
    monkeypatch.setattr("miracle_hub.hub.push.HfApi", functools.partial(HfApi, endpoint=hub.url))
    download = functools.partial(snapshot_download, endpoint=hub.url)
    monkeypatch.setattr("miracle_hub.files.snapshots.snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
