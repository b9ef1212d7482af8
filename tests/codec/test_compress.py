"""A folder of payloads: what is coded, what stays plain bit for bit, and the same files every time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.report import Report
from miracle_hub.errors import OptionError
from miracle_hub.options import DecompressOptions
from miracle_hub.sizes import parse_size

Compress = Callable[..., Report]
LeastSize = Callable[..., int]
SaveModel = Callable[..., Path]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_matrices_come_back_with_the_measured_error_and_the_report_says_what_was_written(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    report = compress(model, tmp_path / "out")
    decoded = load_state_dict(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in decoded.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    for entry in inspect_folder(tmp_path / "out").tensors:
        difference = (decoded[entry.name] - tensors[entry.name]).double().square().sum()
        error = float(difference / tensors[entry.name].double().square().sum())
        assert entry.reason or entry.relative_error == pytest.approx(error, rel=1e-5)
        assert error < 0.08
    n_bytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.compressed_bytes == n_bytes
    assert report.dense_bytes == (model / "model.safetensors").stat().st_size
    assert report.n_weights == sum(t.numel() for t in tensors.values())
    assert report.bits_per_weight == 8 * n_bytes / report.n_weights <= 3.0


def test_the_same_inputs_give_the_same_files_and_another_seed_other_ones(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compress(model, tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    a, c = load_state_dict(tmp_path / "a"), load_state_dict(tmp_path / "c")
    assert not torch.equal(a["first.weight"], c["first.weight"])
    assert torch.equal(a["norm.weight"], c["norm.weight"])


def test_config_names_the_method_and_keeps_everything_else(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    config = {"model_type": "bert", "dtype": "float32", "größe": [1, {"a": None}]}
    source = save_model(tensors, config=config)
    report = compress(source, tmp_path / "out", seed=3, modules_to_not_convert=["second"], bits_per_weight=18)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    facts = written.pop("quantization_config")
    assert written == config
    assert facts["quant_method"] == "miracle" and facts["format_version"] == 1 and facts["seed"] == 3
    assert facts["digest"] == report.digest == inspect_folder(tmp_path / "out").digest
    assert facts["modules_to_not_convert"] == ["second"]


def test_a_null_quantization_config_is_a_dense_model(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    source = save_model(tensors, config={"model_type": "bert", "quantization_config": None})
    compress(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "miracle"


def test_tensors_that_cannot_be_coded_stay_plain_bit_for_bit_with_a_reason(
    save_model: SaveModel, compress: Compress, least_size: LeastSize, tmp_path: Path
) -> None:
    vector, integer = "a vector of fewer than 32768 weights", "is not floating point"
    plain = {
        "empty": (torch.zeros(0, 5), "empty"),
        "empty.bias": (torch.zeros(0), "empty"),
        "integers": (torch.arange(2), f"dtype I64 {integer}"),
        "bytes": (torch.arange(20, dtype=torch.uint8), f"dtype U8 {integer}"),
        "two_bytes": (torch.tensor([77, 82], dtype=torch.uint8), f"dtype U8 {integer}"),
        "mask": (torch.arange(21).view(3, -1) % 3 == 0, f"dtype BOOL {integer}"),
        "flag": (torch.tensor(True), f"dtype BOOL {integer}"),
        "scalar": (torch.tensor(1.5), vector),
        "complex": (torch.view_as_complex(randn(40, 40, 2)), "dtype C64"),
        "float8": (randn(40, 40).to(torch.float8_e4m3fn), "dtype F8_E4M3"),
        "little": (randn(31, 33), "fewer than 1024 weights"),
        "norm.running_mean": (randn(3000), vector),
        "odd.half": (randn(5).half(), vector),
        "odd.wide": (randn(7).double(), vector),
        "tiny": (randn(64, 64) * 1e-30, "root mean square outside 2^-40 … 2^40"),
        "huge": (randn(64, 64) * 1e30, "root mean square outside 2^-40 … 2^40"),
    }
    if float4 := getattr(torch, "float4_e2m1fn_x2", None):
        plain["float4"] = (torch.arange(64, dtype=torch.uint8).view(8, 8).view(float4), "dtype F4")
    source = save_model({"w": randn(64, 64)} | {name: tensor for name, (tensor, _) in plain.items()})
    report = compress(source, tmp_path / "out", size=least_size(source))
    stored, decoded = load_file(tmp_path / "out" / "model.safetensors"), load_state_dict(tmp_path / "out")
    for name, (tensor, _) in plain.items():
        for found in (stored[name], decoded[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(raw(found), raw(tensor)), name
    assert report.plain == {name: reason for name, (_, reason) in plain.items()}
    found = {tensor.name: tensor.reason for tensor in inspect_folder(tmp_path / "out").tensors}
    assert found.pop("w") == "" and found.keys() == plain.keys()
    for name, (_, reason) in plain.items():  # a file does not prove why a tensor was left alone
        assert found[name] == (reason if reason.startswith(("empty", "dtype")) else "stored plainly"), name


def test_every_tensor_is_aligned_to_its_own_width(
    save_model: SaveModel, compress: Compress, least_size: LeastSize, tmp_path: Path
) -> None:
    odd = [torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16, torch.bool]
    tensors = {f"{8 - i}.bias": torch.ones(2 * i + 1, dtype=dtype) for i, dtype in enumerate(odd)}
    source = save_model({"w": randn(64, 64), **tensors, "0": torch.ones(3, dtype=torch.uint8)})
    compress(source, tmp_path / "out", size=least_size(source))
    decompress_folder(tmp_path / "out", tmp_path / "dense", DecompressOptions(progress=False))
    for folder in ("out", "dense"):
        data = (tmp_path / folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]
        assert length % 8 == 0
        for name, entry in header.items():
            width = int("".join(filter(str.isdigit, entry["dtype"])) or 8) // 8
            assert entry["data_offsets"][0] % width == 0, (folder, name)


def test_norms_and_biases_are_halved_counted_and_restored_to_float32(
    save_model: SaveModel, compress: Compress, least_size: LeastSize, tmp_path: Path
) -> None:
    narrowed = {"norm.weight": 1 + 0.1 * randn(300), "norm.bias": randn(300, seed=1)}
    kept = {
        "wide.bias": torch.tensor([1e6, 1.0]),
        "fine.weight": torch.full((50,), 1e-7),
        "norm.running_var": torch.rand(300),
    }
    source = save_model({"w": randn(64, 64), **narrowed, **kept, "half.bias": randn(20).half()})
    report = compress(source, tmp_path / "out", size=least_size(source))
    stored, decoded = load_file(tmp_path / "out" / "model.safetensors"), load_state_dict(tmp_path / "out")
    for name, tensor in narrowed.items():
        assert stored[name].dtype == torch.float16
        assert decoded[name].dtype == torch.float32 and torch.equal(decoded[name], tensor.half().float())
    for name, tensor in kept.items():
        assert stored[name].dtype == torch.float32 and torch.equal(decoded[name], tensor)
    assert decoded["half.bias"].dtype == torch.float16
    report = {tensor.name: tensor for tensor in inspect_folder(tmp_path / "out").tensors}
    assert report["norm.bias"].rate == 16 and report["wide.bias"].rate == 32


def test_excluded_tensors_stay_plain(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    compress(model, tmp_path / "out", modules_to_not_convert=["first"], bits_per_weight=18)
    assert torch.equal(load_state_dict(tmp_path / "out")["first.weight"], tensors["first.weight"])
    reasons = {tensor.name: tensor.reason for tensor in inspect_folder(tmp_path / "out").tensors}
    assert reasons["first.weight"] == "excluded by modules_to_not_convert" and not reasons["second.weight"]


MEANT = {
    "frist": "near it: 'first'; correct it (give the option once for each)",
    "frist.*": "near it: 'first'; correct it (a string is a regular expression of whole names)",
    "first,second": "near it: 'second'; correct it (give the option once for each)",
}


@pytest.mark.parametrize("wanted", [["first", "frist"], ["frist"], "frist.*", ["first,second"]], ids=str)
def test_a_misspelled_exclusion_is_refused(
    wanted: list[str] | str, model: Path, compress: Compress, tmp_path: Path
) -> None:
    wrong = wanted if isinstance(wanted, str) else wanted[-1]
    with pytest.raises(OptionError) as raised:
        compress(model, tmp_path / "out", modules_to_not_convert=wanted, bits_per_weight=18)
    assert str(raised.value) == (
        f"modules_to_not_convert: expected modules or tensors of the model, found {wrong!r}, which takes "
        f"none; {MEANT[wrong]}, or leave it out"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_in_their_own(
    dtype: torch.dtype, save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    source = save_model({"w": randn(80, 64).to(dtype), "norm.weight": randn(64).to(dtype)})
    compress(source, tmp_path / "out", bits_per_weight=6)
    decoded = load_state_dict(tmp_path / "out")
    assert {tensor.dtype for tensor in decoded.values()} == {dtype}
    assert torch.equal(decoded["norm.weight"], randn(64).to(dtype))
    assert torch.nn.functional.mse_loss(decoded["w"].double(), randn(80, 64).double()) < 0.01


def test_odd_shapes_are_coded_without_any_demand_on_the_user(
    save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    shapes = [(1, 1024), (1000, 7), (13, 5, 7, 11), (2, 64, 48), (40_000,), (96, 64, 1, 1), (1, 197, 32)]
    tensors = {f"t{i}": randn(*shape, seed=i) for i, shape in enumerate(shapes)}
    source = save_model(tensors)
    for rotation in (128, 1, 64):
        compress(source, tmp_path / f"out{rotation}", rotation=rotation)
        decoded = load_state_dict(tmp_path / f"out{rotation}")
        for entry in inspect_folder(tmp_path / f"out{rotation}").tensors:
            assert not entry.reason and entry.relative_error < 0.2
            assert decoded[entry.name].shape == tensors[entry.name].shape
            assert entry.rotation <= (rotation or 128)


def test_sharded_in_and_sharded_out_with_an_index_that_is_right(
    save_model: SaveModel, compress: Compress, tmp_path: Path
) -> None:
    tensors = {f"layer.{i}.weight": randn(64, 64, seed=i) for i in range(7)} | {"layer.bias": randn(64)}
    sharded, single = save_model(tensors, "sharded", shards=3), save_model(tensors, "single")
    compress(sharded, tmp_path / "a", max_shard_size="4kB")
    compress(single, tmp_path / "b")
    a, b = load_state_dict(tmp_path / "a"), load_state_dict(tmp_path / "b")
    assert a.keys() == b.keys() == tensors.keys()
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    n = len(shards)
    assert n > 2 and shards == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    total = 0
    for shard in shards:
        held = load_file(tmp_path / "a" / shard)
        assert sorted(held) == sorted(name for name, file in index["weight_map"].items() if file == shard)
        n_bytes = sum(tensor.nbytes for tensor in held.values())
        assert n_bytes <= 4000 or len(held) == 1
        total += n_bytes
    assert index["metadata"]["total_size"] == total and set(index["weight_map"]) == set(tensors)
    n_bytes = sum((tmp_path / "a" / shard).stat().st_size for shard in shards)
    assert 0.99 * 3 * 28736 / 8 < n_bytes <= 3 * 28736 / 8


def test_other_files_are_copied_but_no_other_weights_cards_or_hidden_ones(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "1_Pooling/config.json", "code.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"content of {name}")
    for name in ("pytorch_model.bin", "README.md", ".git/config", "onnx/model.onnx", "old.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("not wanted")
    compress(model, tmp_path / "out")
    assert {n for n in files(tmp_path / "out")} == {
        "config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json", "code.py"
    }  # fmt: skip
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "content of 1_Pooling/config.json"


def test_weights_in_subfolders_are_copied_and_counted(
    model: Path, tensors: dict[str, Tensor], compress: Compress, least_size: LeastSize, tmp_path: Path
) -> None:
    (model / "2_Dense").mkdir()
    save_file({"linear.weight": randn(20, 30)}, model / "2_Dense" / "model.safetensors")
    nested = (model / "2_Dense" / "model.safetensors").stat().st_size
    report = compress(model, tmp_path / "out", bits_per_weight=5)
    own = (tmp_path / "out" / "model.safetensors").stat().st_size
    n_weights = sum(t.numel() for t in tensors.values()) + 600
    assert report.compressed_bytes == own + nested and report.n_weights == n_weights
    assert 0.995 * 5 <= 8 * (own + nested) / n_weights <= 5
    inspection = inspect_folder(tmp_path / "out")
    assert inspection.bits_per_weight == report.bits_per_weight
    assert {t.name: t.reason for t in inspection.tensors}["2_Dense/linear.weight"] == "in a subfolder, copied"
    assert compress(model, tmp_path / "least", size=least_size(model)).compressed_bytes == least_size(model)


def test_a_card_is_written_with_the_report(model: Path, compress: Compress, tmp_path: Path) -> None:
    seen: list[Report] = []

    def card(folder: Path, report: Report) -> None:
        seen.append(report)
        (folder / "README.md").write_text("card")

    assert seen == [] and compress(model, tmp_path / "out", card=card) == seen[0]
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_a_folder_without_config_compresses_all_the_same(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    (model / "config.json").unlink()
    compress(model, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert len(load_state_dict(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits_per_weight": None, "size": None},
            "expected either bits_per_weight or size, found neither; give one of them",
        ),
        (
            {"bits_per_weight": 2.0, "size": "5kB"},
            "expected either bits_per_weight or size, found both; give one of them",
        ),
        (
            {"rotation": 96},
            "rotation: expected a power of two up to 32768, found 96; 128 suits most models, 1 is none",
        ),
        ({"rotation": 0}, "rotation: expected a power of two up to 32768, found 0; "),
        ({"rotation": 65536}, "rotation: expected a power of two up to 32768, found 65536; "),
        ({"window_bits": 7}, "window_bits: expected 8 to 16, found 7; longer windows are slower"),
        ({"window_bits": 17}, "window_bits: expected 8 to 16, found 17; longer windows are slower"),
        ({"seed": -1}, "seed: expected 0 to 18446744073709551615, found -1; "),
        (
            {"size": "many"},
            "size: expected a positive number of bytes such as 5.5MB, 800kB or 1GiB, found 'many'",
        ),
        ({"size": "0MB"}, "size: expected a positive number of bytes such as"),
        ({"max_shard_size": "-5GB"}, "max_shard_size: expected a positive number of bytes such as"),
    ],
)
def test_an_option_out_of_range_is_named_before_anything_is_written(
    options: dict[str, Any], message: str, model: Path, compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as raised:
        compress(model, tmp_path / "out", **options)
    assert str(raised.value).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("5.5MB", 5_500_000),
        ("800 kB", 800_000),
        ("1GiB", 2**30),
        ("1.5KiB", 1536),
        ("12", 12),
        ("7 B", 7),
        (12_345, 12_345),
        ("2gb", 2 * 10**9),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "5.5.5MB", "5 XB", "1e6", "nan", "0.1B", "5,5MB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="^size: expected a positive number of bytes"):
        parse_size(text)
