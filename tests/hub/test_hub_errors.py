"""Hub ids that cannot be had: one line that names the id and says what to do, and no waiting."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Client, stopped_url
from .loopback import LoopbackHub
from .loopback_parts import DROP_CONNECTION, Fault

TRY = """
import json, sys, time
import miracle_hub
from miracle_hub.errors import MiracleError
found, slept, sleep = {}, [], time.sleep
time.sleep = lambda seconds: slept.append(seconds) or sleep(seconds)
for source, revision in json.loads(sys.argv[1]):
    slept.clear()
    try:
        miracle_hub.load_state_dict(source, revision=revision)
    except MiracleError as error:
        found[source] = [type(error).__name__, str(error), sum(slept)]
print(json.dumps(found))
"""
FAULTS: dict[str, int | Fault] = {
    "user/failing": 500,
    "user/hanging-up": DROP_CONNECTION,
    "user/behind-a-portal": 200,  # an empty answer that is no JSON
    "user/cut-off/resolve": DROP_CONNECTION,
}
NEITHER = "expected a local folder or a Hub repository; there is no such folder, and"
UNREADABLE = f"{NEITHER} the Hub could not be read"
ERRORS: dict[str, tuple[str, str]] = {
    "user/missing": ("SourceError", f"{NEITHER} the Hub has no such repository; check the spelling"),
    "missing": ("SourceError", f"{NEITHER} the Hub has no such repository; check the spelling"),
    "user/private": ("SourceError", "log in with `hf auth login` if the repository is private"),
    "user/two words": ("SourceError", f"{NEITHER} this is no Hub id (name or owner/name)"),
    "./models/bert": ("SourceError", f"{NEITHER} this is no Hub id (name or owner/name)"),
    "n" * 300: ("SourceError", f"{NEITHER} this is no Hub id (name or owner/name)"),
    "user/unbranched": ("SourceError", "no branch, tag or commit 'retrained'; check the spelling"),
    "user/failing": ("SourceError", f"{UNREADABLE} (HfHubHTTPError: Server error"),
    "user/hanging-up": ("SourceError", f"{UNREADABLE} (RemoteProtocolError: Server disconnected"),
    "user/behind-a-portal": ("SourceError", f"{UNREADABLE} (JSONDecodeError: "),
    "user/cut-off": ("SourceError", UNREADABLE),
    "user/bare": ("MissingWeightsError", "expected model.safetensors"),
    "user/pickled": ("PickleRefusedError", "found only pickle weights (pytorch_model.bin)"),
}
REVISIONS = {"user/unbranched": "retrained"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """Repositories without safetensors."""
    bare, pickled = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("pickled")
    (bare / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80 not to be opened")
    with LoopbackHub() as running:
        for repo_id in ("user/bare", "user/unbranched", "user/cut-off"):
            running.add(repo_id, bare)
        running.add("user/private", bare, private=True)
        running.add("user/pickled", pickled)
        running.faults = FAULTS
        yield running


@pytest.fixture(scope="module")
def errors(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, float]]:
    """What every source of ERRORS raised, in one process without a token."""
    sources = [(source, REVISIONS.get(source)) for source in ERRORS]
    return Client(hub.url, tmp_path_factory.mktemp("home")).python(TRY, json.dumps(sources))


@pytest.mark.parametrize("source", ERRORS, ids=lambda source: source[:20])
def test_unreadable_source_says_what_to_do_at_once(
    source: str, errors: dict[str, tuple[str, str, float]]
) -> None:
    kind, message, seconds = errors[source]
    expected_kind, words = ERRORS[source]
    assert kind == expected_kind
    assert message.startswith(f"{source}: ")
    assert words in message
    assert "\n" not in message
    assert seconds < 5  # asleep between tries; once a download runs it would be 23 s


def test_refused_pickles_are_not_downloaded(
    hub: LoopbackHub, errors: dict[str, tuple[str, str, float]]
) -> None:
    assert hub.downloads("user/pickled") == set()


def test_command_line_reports_a_missing_repository_in_one_line(hub: LoopbackHub, tmp_path: Path) -> None:
    done = Client(hub.url, tmp_path / "home").miracle(
        "compress", "user/missing", tmp_path / "out", "--size", "1MB"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("miracle: user/missing: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unreachable_hub_is_a_source_error(tmp_path: Path) -> None:
    nowhere = Client(stopped_url(), tmp_path)
    kind, message, _ = nowhere.python(TRY, json.dumps([["user/model", None]]))["user/model"]
    assert kind == "SourceError"
    assert UNREADABLE in message and "Connection refused" in message
