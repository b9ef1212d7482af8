"""The configuration of layers that stay compressed, and what is refused while they load."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miracle_hub import MiracleConfig
from miracle_hub.errors import ChecksumError, FormatError, OptionError
from miracle_hub.format.payload import decode_header, encode_payload
from miracle_hub.plugin.compressed_linear import CompressedLinear, compressed_layers
from tests.hub.damaged import change_config
from tests.hub.kept import LAYER, keep, load, quantization
from tests.limits import HANG_SECONDS

if TYPE_CHECKING:
    from tests.hub.conftest import Repository


@pytest.fixture
def model(llama: Repository) -> Any:
    return load(llama)


def test_the_users_options_win_and_the_repositorys_digest_stays(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    change_config(tmp_path / "out", keep_compressed=True, backend="triton")
    auto: Any = AutoModelForCausalLM
    by_file = auto.from_pretrained(tmp_path / "out")
    assert compressed_layers(by_file)[LAYER].backend == "triton"
    by_user = auto.from_pretrained(tmp_path / "out", quantization_config=keep(backend="cpu"))
    assert compressed_layers(by_user)[LAYER].backend == "cpu"
    assert by_user.config.quantization_config.digest == quantization(llama.compressed)["digest"]
    assert not compressed_layers(auto.from_pretrained(tmp_path / "out", quantization_config=MiracleConfig()))


def test_options_of_loading_are_not_written(model: Any) -> None:
    config = model.config.quantization_config
    assert config.keep_compressed and config.backend == "auto"
    assert not {"keep_compressed", "backend", "dequantize"} & config.to_dict().keys()
    assert "keep_compressed" not in model.config.to_json_string()


def test_loading_as_asked_for_warns_of_nothing(llama: Repository) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(llama)
    assert not [str(warning.message) for warning in caught]


@pytest.mark.parametrize("options", [{"backend": "gpu"}, {"backend": None}, {"keep_compressed": "yes"}])
def test_an_option_that_is_none_is_a_named_error(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(
        OptionError, match=rf"^MiracleConfig: {name}: expected .*, found {value!r}; (leave it|choose)"
    ):
        MiracleConfig(**options)


def test_the_plug_in_knows_a_model_is_quantized(model: Any) -> None:
    assert model.is_quantized and model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable
    assert model.config.quantization_config.quant_method == "miracle"


def test_a_damaged_payload_is_refused_on_load(llama: Repository, tmp_path: Path) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{LAYER}.weight"][-1] ^= 1
    save_file(tensors, path, {"format": "pt", "narrowed_from_F32": "*"})
    with pytest.raises(ChecksumError, match=rf"^{LAYER}\.weight: .*download it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=keep())


def test_a_scale_out_of_range_behind_a_right_checksum_is_refused_on_load(
    llama: Repository, tmp_path: Path
) -> None:
    shutil.copytree(llama.compressed, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    data = tensors[f"{LAYER}.weight"].numpy().tobytes()
    header, start = decode_header(data, "w")
    damaged = encode_payload(header, b"\xff\xff" + data[start + 2 :])
    tensors[f"{LAYER}.weight"] = torch.frombuffer(bytearray(damaged), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt", "narrowed_from_F32": "*"})
    with pytest.raises(FormatError, match=rf"^{LAYER}\.weight: scale 0 .*expected 0 or a number"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=keep())


@pytest.mark.parametrize(
    "first", ["", "import transformers.quantizers.auto", "import miracle_hub.plugin.quantizer"]
)
def test_the_config_is_imported_from_the_package_in_a_fresh_process(
    first: str, llama: Repository, tmp_path: Path
) -> None:
    code = f"""
{first}
from miracle_hub import MiracleConfig
from transformers import AutoModel
config = MiracleConfig(keep_compressed=True)
model = AutoModel.from_pretrained({str(llama.compressed)!r}, quantization_config=config)
print(type(model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CompressedLinear.__name__


@pytest.mark.parametrize("names", [5, [1], ("a",)], ids=str)
def test_names_of_modules_are_a_list_of_names_or_a_regular_expression(names: Any) -> None:
    with pytest.raises(
        OptionError,
        match="^MiracleConfig: modules_to_not_convert: expected a list of names or a regular expression, ",
    ):
        keep(modules_to_not_convert=names)
