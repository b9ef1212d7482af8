"""Models that cannot be compressed: a named error that says what, where and the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.report import Report
from miracle_hub.errors import (
    FormatError,
    MissingWeightsError,
    NonFiniteWeightError,
    OptionError,
    PickleRefusedError,
    SourceError,
)
from miracle_hub.options import DecompressOptions

Compress = Callable[..., Report]
SaveModel = Callable[..., Path]


@pytest.mark.parametrize(
    ("value", "dtype", "found"),
    [
        (torch.nan, torch.float32, "nan"),
        (torch.inf, torch.bfloat16, "inf"),
        (-torch.inf, torch.float16, "-inf"),
        (torch.inf, torch.float64, "inf"),
    ],
)
def test_a_weight_that_is_not_finite_is_named_with_its_position(
    value: float,
    dtype: torch.dtype,
    found: str,
    save_model: SaveModel,
    tensors: dict[str, Tensor],
    compress: Compress,
    least_size: Callable[..., int],
    tmp_path: Path,
) -> None:
    tensors["second.weight"] = tensors["second.weight"].to(dtype)
    tensors["second.weight"][3, 7] = value
    tensors["second.weight"][5, 0] = value
    source = save_model(tensors)
    with pytest.raises(NonFiniteWeightError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value) == (
        f"second.weight: expected finite weights, found {found} at position 295 "
        f"({source / 'model.safetensors'}); repair the model, or leave the tensor out with "
        "modules_to_not_convert"
    )
    excluded = ["second.weight"]
    size = least_size(source, modules_to_not_convert=excluded)
    compress(source, tmp_path / "out", modules_to_not_convert=excluded, size=size)
    kept = load_state_dict(tmp_path / "out")["second.weight"]
    assert torch.equal(kept.nan_to_num(), tensors["second.weight"].nan_to_num())


def test_pickle_is_refused_with_the_way_out(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save({"w": torch.zeros(64, 64)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(PickleRefusedError) as raised:
        compress(tmp_path / "model", tmp_path / "out")
    assert str(raised.value) == (
        f"{tmp_path / 'model'}: expected model.safetensors, found only pickle weights (pytorch_model.bin), "
        "which can run code when opened; convert them once where you trust them: "
        "AutoModel.from_pretrained(source).save_pretrained(folder)"
    )


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_weights_says_what_was_expected(
    exists: bool, compress: Compress, tmp_path: Path
) -> None:
    if exists:
        (tmp_path / "model").mkdir()
    for read in (
        lambda: compress(tmp_path / "model", tmp_path / "out"),
        lambda: load_state_dict(tmp_path / "model"),
    ):
        with pytest.raises(MissingWeightsError) as raised:
            read()
        assert str(raised.value) == (
            f"{tmp_path / 'model'}: expected model.safetensors or model.safetensors.index.json, found "
            "neither; pass a folder written by save_pretrained, or a Hub id"
        )


def test_a_missing_shard_is_named(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingWeightsError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value) == (
        f"{source}: model.safetensors.index.json names model-00002-of-00003.safetensors, which is missing; "
        "download the folder again"
    )


@pytest.mark.parametrize("kept", [0, 9, 300, -1])
def test_a_truncated_file_is_named(kept: int, model: Path, compress: Compress, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(FormatError) as raised:
        compress(model, tmp_path / "out")
    message = str(raised.value)
    n_bytes = file.stat().st_size
    assert message.startswith(f"{file}: expected a safetensors file, found {n_bytes} bytes that are not: ")
    assert message.endswith("; the file is truncated or damaged: download it again")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 5, None, ["x"]])
def test_an_index_that_leaves_the_folder_is_refused(
    name: object, save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, shards=2)
    save_file({"w": torch.zeros(3)}, tmp_path / "x.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value).startswith(f"{index}: expected ")
    if isinstance(name, str):
        assert str(raised.value) == (
            f"{index}: expected file names without folders, found {name!r}; the index is hostile or damaged"
        )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", FormatError),
        ("[]", FormatError),
        ("{}", FormatError),
        ('{"weight_map": []}', FormatError),
        ("\xff", FormatError),
        ('{"weight_map": {}}', MissingWeightsError),
    ],
)
def test_an_index_that_is_none_is_named(
    text: str, kind: type[Exception], save_model: SaveModel, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source = save_model(tensors, shards=2)
    index = source / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(kind) as raised:
        load_state_dict(source)
    assert str(raised.value).startswith(f"{index}: expected a") and "download it again" in str(raised.value)


def test_a_tensor_in_two_shards_is_named(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, shards=2)
    first = source / "model-00001-of-00002.safetensors"
    second = source / "model-00002-of-00002.safetensors"
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value) == (
        f"{second}: tensor first.weight is also in {first}; expected each tensor once: save the model again"
    )


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_quantized_source_is_refused(
    method: str, save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, config={"quantization_config": {"quant_method": method}})
    with pytest.raises(SourceError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value) == (
        f"{source / 'config.json'}: expected a dense model, found one quantized with {method!r}; "
        "compress the model it was made from"
    )


def test_payloads_in_the_source_are_refused_even_where_no_config_tells(
    compressed: Path, compress: Compress, tmp_path: Path
) -> None:
    (compressed / "config.json").unlink()
    with pytest.raises(SourceError, match=r"first\.weight: expected plain numbers, found bytes that begin"):
        compress(compressed, tmp_path / "out")


@pytest.mark.parametrize("text", [b"MRCL", b"MRCL\x02 and more"])
def test_plain_bytes_that_begin_like_a_payload_are_refused(
    text: bytes, save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    tensors["notes"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    source = save_model(tensors)
    with pytest.raises(SourceError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value) == (
        f"{source / 'model.safetensors'}: notes: expected plain numbers, found bytes that begin like a "
        "compressed tensor (MRCL), which readers would take for one; decompress the source first, or store "
        "the tensor in another dtype or shape"
    )


def test_bytes_of_other_shapes_or_dtypes_may_begin_that_way(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    letters = torch.frombuffer(bytearray(b"MRCL"), dtype=torch.uint8)
    plain = {
        "matrix": letters.view(2, 2).clone(),
        "signed": letters.to(torch.int8),
        "short": letters[:3].clone(),
    }
    compress(save_model(tensors | plain), tmp_path / "out")
    decoded = load_state_dict(tmp_path / "out")
    assert all(torch.equal(decoded[name], tensor) for name, tensor in plain.items())


def test_a_model_with_nothing_to_compress_says_why(
    save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    source = save_model({"ids": torch.arange(5000), "bias": torch.zeros(5000), "w": torch.zeros(30, 30)})
    with pytest.raises(SourceError) as raised:
        compress(source, tmp_path / "out")
    assert str(raised.value) == (
        "expected at least one tensor to compress, found none (a vector of fewer than 32768 weights; "
        "dtype I64 is not floating point; fewer than 1024 weights); keep this model as it is"
    )
    with pytest.raises(SourceError, match="no tensors at all"):
        compress(save_model({}, "nothing"), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "expected JSON, found"),
        ("[1]", "expected a JSON object, found a list"),
        ("\xff", "expected JSON"),
    ],
)
def test_a_config_that_is_none_is_named(
    text: str, found: str, model: Path, compress: Compress, tmp_path: Path
) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError) as raised:
        compress(model, tmp_path / "out")
    assert str(raised.value).startswith(f"{model / 'config.json'}: {found}")


def test_a_quantization_config_that_is_no_object_is_named(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, config={"quantization_config": "int8"})
    with pytest.raises(SourceError, match="quantization_config: expected a JSON object, found 'int8'"):
        compress(source, tmp_path / "out")


def test_a_dtype_that_torch_lacks_is_named(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    entry = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    text = json.dumps({"strange": entry}).encode()
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "a.safetensors")
    (model / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(3))
    with pytest.raises(SourceError) as raised:
        compress(model, tmp_path / "out")
    assert str(raised.value) == (
        f"{model / 'b.safetensors'}: strange: expected a dtype that torch knows, found F6_E2M3 (Dtype not "
        "understood: F6_E2M3); upgrade torch and safetensors, or convert the tensor"
    )


@pytest.mark.parametrize("out", ["model", "model/out", "model/a/b", ".", "model/../model", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_would_touch_the_source_is_refused(
    out: str, overwrite: bool, model: Path, compress: Compress, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(model)
    before = load_file(model / "model.safetensors")
    target = tmp_path / out

    def decompress() -> None:
        decompress_folder(model, target, DecompressOptions(overwrite=overwrite, progress=False))

    for write in (lambda: compress(model, target, overwrite=overwrite), decompress):
        with pytest.raises(OptionError) as raised:
            write()
        assert str(raised.value) == (
            f"{target}: expected an output folder apart from the source {model}, found one that is it, is "
            "inside it or holds it; choose another"
        )
    assert load_file(model / "model.safetensors").keys() == before.keys()
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]
