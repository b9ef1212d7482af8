"""A Hub that breaks off, lies about lengths, fails for a while or is slow; mirrors, proxies, and caches.

Whatever happens, a load gives the right tensors or a named error, the cache never holds half a file, and the
next load, when all is well again, gives the right tensors.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import miracle_hub

from .client import Client, stopped_url
from .loopback import LoopbackHub
from .loopback_parts import Answer, Blob, Fault
from .proxy import LoopbackProxy

# The client's patience with one answer: many times what an answer takes on a loaded machine.
PATIENCE_SECONDS = 10


def broken_off(answer: Answer) -> Answer:
    return replace(answer, sent=len(answer.body) // 2)


def shorter(answer: Answer) -> Answer:
    return replace(answer, body=answer.body[: len(answer.body) // 2])


def longer(answer: Answer) -> Answer:
    return replace(answer, body=answer.body + bytes(100))


def longer_than_declared(answer: Answer) -> Answer:
    return replace(
        longer(answer), headers=answer.headers | {"Content-Length": str(len(answer.body))}, sent=10**9
    )


def slow(answer: Answer) -> Answer:
    time.sleep(0.3)
    return answer


def hanging(answer: Answer) -> Answer:
    time.sleep(PATIENCE_SECONDS + 1)
    return replace(answer, sent=0)


# Of the weights' download.
FAULTS = {
    "broken-off": Fault(broken_off, times=2),
    "broken-off-without-ranges": Fault(broken_off, times=2),
    "shorter": Fault(shorter, times=1),
    "longer": Fault(longer, times=1),
    "longer-than-declared": Fault(longer_than_declared, times=1),
    "slow": Fault(slow),
    "hanging": Fault(hanging, times=1),
    "failing": Fault(lambda answer: Answer(status=500), times=1),
    "overloaded": Fault(lambda answer: Answer(status=429), times=1),
}
TRY = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import miracle_hub
from huggingface_hub import constants
from miracle_hub.errors import MiracleError
from safetensors.torch import save_file
from transformers import AutoModel

def load(name, round):
    try:
        tensors = miracle_hub.load_state_dict(f"user/{name}")
    except MiracleError as error:
        return [type(error).__name__, str(error)]
    save_file(tensors, Path(sys.argv[1]) / f"{name}-{round}.safetensors")
    return ["", ""]

def from_pretrained(name):
    try:
        AutoModel.from_pretrained(f"user/{name}")
    except OSError:
        return "OSError"
    return ""

names = json.loads(sys.argv[2])
with ThreadPoolExecutor(len(names)) as pool:
    loads = [dict(zip(names, pool.map(load, names, [round] * len(names)))) for round in (1, 2, 3)]
models = {name: [from_pretrained(f"{name}-model") for _ in range(3)] for name in ("failing", "shorter")}
Path(sys.argv[1], "file").touch()
constants.HF_HUB_CACHE = str(Path(sys.argv[1], "file", "hub"))
print(json.dumps({"loads": loads, "models": models, "cacheless": load("good", 4)}))
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=96, intermediate_size=64, **sizes)).save_pretrained(folder / "dense")
    options: dict[str, Any] = {"bits_per_weight": 5, "window_bits": 8, "progress": False}
    miracle_hub.compress(folder / "dense", folder / "compressed", **options)
    return folder / "compressed"


@pytest.fixture(scope="module")
def hub(compressed: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        for name in [*FAULTS, "failing-model", "shorter-model", "good"]:
            running.add(f"user/{name}", compressed)
        running.without_ranges = {"user/broken-off-without-ranges"}
        for name, fault in FAULTS.items():
            commit = running.repositories[f"user/{name}"].find("main")
            running.faults[f"user/{name}/resolve/{commit}/model.safetensors"] = fault
        for name in ("failing", "shorter"):
            running.faults[f"user/{name}-model/resolve"] = replace(FAULTS[name])
        yield running


@dataclass(frozen=True)
class Tried:
    """What a client went through, in one process, and where it put what it loaded."""

    client: Client
    out: Path
    said: dict[str, Any]


@pytest.fixture(scope="module")
def tried(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    client, out = Client(hub.url, tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("out")
    patience = dict.fromkeys(("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"), str(PATIENCE_SECONDS))
    return Tried(client, out, client.python(TRY, out, json.dumps(list(FAULTS)), **patience))


def assert_loaded(file: Path, compressed: Path) -> None:
    found, expected = load_file(file), miracle_hub.load_state_dict(compressed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_faulty_downloads_end_in_the_right_tensors_or_a_named_error(tried: Tried, compressed: Path) -> None:
    for number, said in enumerate(tried.said["loads"], 1):
        for fault, (kind, message) in said.items():
            if kind:
                assert message.startswith(f"user/{fault}: expected a local folder or a Hub repository; "), (
                    fault
                )
            else:
                assert_loaded(tried.out / f"{fault}-{number}.safetensors", compressed)
    # Which other faults a client gets over by itself depends on its version.
    assert [tried.said["loads"][0][fault][0] for fault in ("slow", "shorter", "longer")] == [
        "",
        "SourceError",
        "SourceError",
    ]


def test_when_all_is_well_again_loads_are_right(tried: Tried) -> None:
    assert tried.said["loads"][-1] == {fault: ["", ""] for fault in FAULTS}


def test_from_pretrained_raises_what_transformers_raises_and_then_loads(tried: Tried) -> None:
    assert tried.said["models"]["shorter"][0] == "OSError"
    assert {said[-1] for said in tried.said["models"].values()} == {""}


def test_the_cache_holds_whole_files_only(tried: Tried, hub: LoopbackHub) -> None:
    names = {path.name: path for path in tried.client.home.glob("hub/models--*/blobs/*")}
    whole = {name: path for name, path in names.items() if not name.endswith(".incomplete")}
    stored = [blob for repository in hub.repositories.values() for blob in repository.files().values()]
    assert set(whole) == {blob.oid for blob in stored}
    for name, path in whole.items():
        assert Blob(path.read_bytes(), is_lfs=len(name) == 64).oid == name, path


def test_a_cache_that_cannot_be_written_is_named(tried: Tried) -> None:
    kind, message = tried.said["cacheless"]
    assert kind == "SourceError"
    assert f"the cache {tried.out / 'file' / 'hub'} cannot be written (" in message
    assert message.endswith("); make room there, or set HF_HOME to a folder that can be written")


# Mirrors, proxies, and no network at all.

LOAD = """
import json, sys
import miracle_hub
from miracle_hub.errors import MiracleError
from safetensors.torch import save_file
found = {}
for name in sys.argv[2:]:
    try:
        save_file(miracle_hub.load_state_dict(f"user/{name}"), f"{sys.argv[1]}/{name}.safetensors")
    except MiracleError as error:
        found[name] = f"{type(error).__name__}: {error}"
"""
SAY = "print(json.dumps(found))"
MODEL = """
from transformers import AutoModel
save_file(AutoModel.from_pretrained("user/good").state_dict(), f"{sys.argv[1]}/model.safetensors")
"""
ELSEWHERE = "http://hub.invalid/mirror"  # an address that only the proxy knows


@pytest.fixture(scope="module")
def mirrored(hub: LoopbackHub, compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client whose cache was filled through a proxy, by a mirror below a path of its own."""
    out = tmp_path_factory.mktemp("out")
    client = Client(ELSEWHERE, tmp_path_factory.mktemp("home"))
    with LoopbackProxy(hub.url) as proxy:
        said = client.python(LOAD + MODEL + SAY, out, "good", HTTP_PROXY=proxy.url, NO_PROXY="")
        assert (said, proxy.hosts) == ({}, {"hub.invalid"})
    assert_loaded(out / "good.safetensors", compressed)
    assert_loaded(out / "model.safetensors", compressed)
    return client


@pytest.mark.parametrize("way", ["no proxy", "offline"])
def test_without_a_network_the_cache_is_read_and_all_else_is_a_named_error(
    way: str, mirrored: Client, compressed: Path, tmp_path: Path
) -> None:
    environment = {"HTTP_PROXY": stopped_url(), "NO_PROXY": ""}
    if way == "offline":
        environment = {"HF_HUB_OFFLINE": "1"}
    said = mirrored.python(LOAD + SAY, tmp_path, "good", "slow", **environment)
    assert_loaded(tmp_path / "good.safetensors", compressed)
    assert said.keys() == {"slow"}
    assert said["slow"].startswith("SourceError: user/slow: expected a local folder or a Hub repository; ")
    if way == "offline":
        cache = mirrored.home / "hub"
        assert said["slow"].endswith(
            f"HF_HUB_OFFLINE is set, and the cache {cache} does not hold all of it; load it once without"
        )
    else:
        assert "check the connection" in said["slow"]
