"""`from_pretrained` with revision, token, cache_dir, local_files_only, subfolder and variant."""

import json
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

import miracle_hub

from .client import Client
from .loopback import LoopbackHub
from .loopback_parts import TOKEN

if TYPE_CHECKING:
    from .conftest import Repository

NAME = "bert.encoder.layer.0.output.dense.weight"
# Every load in one process: importing transformers takes seconds.
LOAD = f"""
import json, sys
from transformers import AutoModelForMaskedLM
found = {{}}
for name, options in json.loads(sys.argv[1]).items():
    try:
        model = AutoModelForMaskedLM.from_pretrained("user/small", **options)
        found[name] = float(model.state_dict()["{NAME}"].double().sum())
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sums(
    repositories: Callable[..., "Repository"], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What each way of loading gave, and what each file decodes to."""
    source, root = repositories("bert-masked-lm").source, tmp_path_factory.mktemp("options")
    expected = {}
    for rate in (5, 6, 7, 8):
        out = root / str(rate)
        miracle_hub.compress(source, out, bits_per_weight=rate, window_bits=8, progress=False)
        expected[rate] = float(miracle_hub.load_state_dict(out)[NAME].double().sum())
    # Branch main: 5 bits, 6 in a subfolder, 7 under the name of a variant; branch "other": a variant alone.
    shutil.copytree(root / "6", root / "5" / "small" / "er")
    shutil.copy(root / "7" / "model.safetensors", root / "5" / "model.seven.safetensors")
    (root / "8" / "model.safetensors").rename(root / "8" / "model.eight.safetensors")
    with LoopbackHub() as hub:
        hub.add("user/small", root / "5", private=True)
        hub.add("user/small", root / "8", branch="other", private=True)
        client, cache = Client(hub.url, root / "home"), str(root / "cache")
        given: dict[str, dict[str, Any]] = {
            "plain": {},
            "subfolder": {"subfolder": "small/er"},
            "variant": {"variant": "eight", "revision": "other"},
            "variant of another digest": {"variant": "seven"},
        }
        options = {name: {**some, "token": TOKEN, "cache_dir": cache} for name, some in given.items()}
        options |= {
            f"local {name}": {**some, "local_files_only": True, "cache_dir": cache}
            for name, some in given.items()
        }
        options["no token"] = {"token": False, "cache_dir": str(root / "other cache")}
        options["local elsewhere"] = {"local_files_only": True, "cache_dir": str(root / "other cache")}
        found = client.python(LOAD, json.dumps(options))
        elsewhere = list((root / "home").rglob("*.safetensors"))
        yield {"found": found, "expected": expected, "elsewhere": elsewhere}


def test_subfolder_variant_and_revision_name_the_file_that_is_decoded(sums: dict[str, Any]) -> None:
    found, expected = sums["found"], sums["expected"]
    assert found["plain"] == expected[5] and found["subfolder"] == expected[6]
    assert found["variant"] == expected[8]


def test_what_was_loaded_once_loads_without_the_hub(sums: dict[str, Any]) -> None:
    for name in ("plain", "subfolder", "variant"):
        assert sums["found"][f"local {name}"] == sums["found"][name]
    assert sums["found"]["local elsewhere"].startswith("OSError")


def test_a_private_repository_needs_the_token(sums: dict[str, Any]) -> None:
    assert sums["found"]["no token"].startswith("OSError")


def test_weights_go_to_the_cache_asked_for(sums: dict[str, Any]) -> None:
    assert sums["elsewhere"] == []


def test_a_variant_that_the_config_is_not_of_is_refused_by_its_digest(sums: dict[str, Any]) -> None:
    assert "config.json promises compressed tensors of digest" in sums["found"]["variant of another digest"]
