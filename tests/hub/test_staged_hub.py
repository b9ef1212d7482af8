"""Repositories with stages on a Hub: only the files of the stages asked for are downloaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import miracle_hub

from .client import Client
from .loopback import LoopbackHub
from .loopback_parts import TOKEN

if TYPE_CHECKING:
    from .conftest import Repository

LOAD = """
import json, sys
from transformers import AutoModelForSequenceClassification as Auto
stages = {"stages": int(sys.argv[1])} if sys.argv[1:] else {}
model = Auto.from_pretrained("user/staged", token=%r, **stages)
print(json.dumps(float(model.bert.encoder.layer[0].output.dense.weight.double().sum())))
"""
READ = """
import json, sys, miracle_hub
state = miracle_hub.load_state_dict("user/staged", stages=int(sys.argv[1]))
print(json.dumps(float(state["bert.encoder.layer.0.output.dense.weight"].double().sum())))
"""
FILES = {n: f"model.stage-{n}.safetensors" for n in (1, 2, 3)}


@pytest.fixture
def hub(repositories: Callable[..., "Repository"], tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub with a private repository of three stages."""
    source = repositories("bert-classifier").source
    miracle_hub.compress(source, tmp_path / "out", bits_per_weight=7, window_bits=8, stages=3, progress=False)
    with LoopbackHub() as running:
        running.add("user/staged", tmp_path / "out", private=True)
        yield running


def staged_downloads(hub: LoopbackHub) -> set[str]:
    return hub.downloads("user/staged") & set(FILES.values())


def test_from_pretrained_downloads_the_stages_it_decodes_and_later_the_others(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    client = Client(hub.url, tmp_path / "home")
    expected = {n: miracle_hub.load_state_dict(tmp_path / "out", stages=n) for n in FILES}
    name = "bert.encoder.layer.0.output.dense.weight"
    for n in (1, 2, 3):
        hub.requests.clear()
        arguments = (str(n),) if n < 3 else ()
        assert client.python(LOAD % TOKEN, *arguments) == float(expected[n][name].double().sum())
        assert staged_downloads(hub) == {FILES[n]}


def test_load_state_dict_downloads_no_later_stage(hub: LoopbackHub, tmp_path: Path) -> None:
    client = Client(hub.url, tmp_path / "home")
    client.python(READ, "2", HF_TOKEN=TOKEN)
    assert staged_downloads(hub) == {FILES[1], FILES[2]}
