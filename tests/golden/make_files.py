"""Writes a repository and a network's file of every version, each once, and files.json: what they hold.

Run it again for a new version of the format, whose files it adds: python tests/golden/make_files.py
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from miracle_hub.code import Code, SplitCode
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.modules import load
from miracle_hub.codec.network import encode_stream_entry, write_network
from miracle_hub.codec.trellis import encode_tensor
from miracle_hub.format.network import NetworkHeader, SharedSpec
from miracle_hub.format.payload import Segment
from miracle_hub.options import CompressOptions

GOLDEN = Path(__file__).parent
# Those that are not called guarded are of before there were guards.
NAMES_OF_FILES = ("repository_1", "repository_2", "repository_2_guarded", "repository_3_guarded")
NAMES_OF_FILES += ("network_1.safetensors", "network_1_guarded.safetensors", "network_2_guarded.safetensors")
# A difference to the dense model in `based_<version>_base`.
NAMES_OF_FILES += ("based_4", "lossless_4")
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
NAMES |= {torch.int64: "I64", torch.uint8: "U8"}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def dense_model(folder: Path, has_constants: bool) -> None:
    """Everything that is stored in a way of its own."""
    tensors = {
        "encoder.0.weight": 0.05 * gaussian(64, 48),
        "encoder.1.weight": gaussian(32, 64).bfloat16(),
        "encoder.conv.weight": gaussian(16, 8, 3, 3).half(),
        "encoder.größe": gaussian(33, 35).double(),
        "norm.weight": 1 + 0.1 * gaussian(48),
        "norm.running_mean": gaussian(48),
        "temperature": torch.tensor(0.7).half(),
        "position_ids": torch.arange(5).view(1, 5),
        "mask": torch.arange(6, dtype=torch.uint8),
        "nothing": torch.zeros(0, 3),
    }
    if has_constants:
        tensors["attention.mask"] = torch.tril(torch.ones(40, 40))
        tensors["attention.infinite"] = torch.full((33, 40), -torch.inf).triu(1).half()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert", "dtype": "float32"}')


def content(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Dtype, shape and SHA-256 of the little-endian bytes."""
    return {
        name: f"{NAMES[t.dtype]} {list(t.shape)} {hashlib.sha256(raw_bytes(t)).hexdigest()}"
        for name, t in tensors.items()
    }


def make_repository(path: Path) -> dict[str, str]:
    """As many stages as its version has at least, and exact tensors from version 3 on."""
    version = int(path.name.split("_")[1])
    stages = min(version, 2)
    with tempfile.TemporaryDirectory() as temporary:
        dense = Path(temporary) / "dense"
        dense_model(dense, version > 2)
        options = CompressOptions(
            bits_per_weight=4.0, window_bits=8, seed=2**40 + 3, max_shard_size=f"{2 * version}kB",
            stages=stages, progress=False,
        )  # fmt: skip
        compress_folder(dense, path, options)
    return content(load_state_dict(path))


def make_based(path: Path) -> dict[str, str]:
    """A difference of everything that is stored in a way of its own, and its base beside it."""
    table = gaussian(300, 16)
    base = {
        "0.weight": 0.05 * gaussian(64, 48),
        "1.weight": gaussian(32, 64).bfloat16(),
        "conv.weight": gaussian(16, 8, 3, 3).half(),
        "words.weight": table,
        "low.weight": gaussian(96, 80).bfloat16(),
        "norm.weight": 1 + 0.1 * gaussian(48),
        "same.weight": gaussian(33, 35).double(),
        "cast.weight": gaussian(20, 35),
        "near.bias": gaussian(48),
        "other.weight": gaussian(3, 3),
    }
    moved = table.clone()
    moved[7::40] += gaussian(8, 16)
    tuned = {
        "0.weight": base["0.weight"] + 0.01 * gaussian(64, 48).flip(0),
        "1.weight": base["1.weight"] + 0.1 * gaussian(32, 64).flip(0).bfloat16(),
        "conv.weight": base["conv.weight"] + 0.1 * gaussian(16, 8, 3, 3).flip(0).half(),
        "words.weight": moved,
        "low.weight": base["low.weight"] + (0.1 * gaussian(96, 2) @ gaussian(2, 80)).bfloat16(),
        "norm.weight": base["norm.weight"] + gaussian(48).flip(0),
        "same.weight": base["same.weight"],
        "cast.weight": base["cast.weight"].bfloat16(),
        "near.bias": base["near.bias"] + 1e-5,
    }
    tuned = {f"encoder.{name}": tensor for name, tensor in tuned.items()} | {"head.weight": gaussian(2, 48)}
    options = CompressOptions(bits_per_weight=1.2, window_bits=8, seed=2**40 + 3, progress=False)
    return compress_beside(path, base, tuned, options)


def make_lossless(path: Path) -> dict[str, str]:
    """A lossless difference of every dtype to every other, and its base beside it."""
    odd = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), 1e-45, 1e-30, -3e38, 65520.0]).repeat(4)
    base = {
        "0.weight": 0.05 * gaussian(64, 48),
        "1.weight": gaussian(32, 64).bfloat16(),
        "conv.weight": gaussian(16, 8, 3, 3).half(),
        "odd.weight": odd.view(4, 8),
        "narrowed.weight": torch.cat([odd, gaussian(64)]),
        "halved.weight": torch.cat([odd.double(), gaussian(64).double() / 3]),
        "widened.weight": gaussian(40).bfloat16(),
        "double.weight": gaussian(33).double(),
        "same.weight": gaussian(33, 35),
        "cast.weight": gaussian(20, 35),
        "position_ids": torch.arange(5).view(1, 5),
        "scale": torch.tensor(0.7),
    }
    turned = odd.flip(0)
    turned.view(torch.int32)[5] = -0x3EDCBB  # a NaN with something in it
    tuned = {
        "0.weight": base["0.weight"] + 0.001 * gaussian(64, 48).flip(0),
        "1.weight": base["1.weight"] + 0.01 * gaussian(32, 64).flip(0).bfloat16(),
        "conv.weight": base["conv.weight"] + 0.01 * gaussian(16, 8, 3, 3).flip(0).half(),
        "odd.weight": turned.view(4, 8),
        "narrowed.weight": base["narrowed.weight"].nan_to_num(1.0).bfloat16() * 1.01,
        "halved.weight": base["halved.weight"].nan_to_num(1.0, 2.0).half() * 0.99,
        "widened.weight": base["widened.weight"].float() * 1.001,
        "double.weight": base["double.weight"] * 1.001,
        "same.weight": base["same.weight"],
        "cast.weight": base["cast.weight"].bfloat16(),
        "position_ids": base["position_ids"] + 1,
        "scale": torch.tensor(0.71),
    }
    tuned = {f"encoder.{name}": tensor for name, tensor in tuned.items()} | {"head.weight": gaussian(2, 48)}
    return compress_beside(path, base, tuned, CompressOptions(exact=True, progress=False))


def compress_beside(
    path: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], options: CompressOptions
) -> dict[str, str]:
    """A difference, and its base in the folder of its name and "_base"."""
    base_folder = path.with_name(f"{path.name}_base")
    with tempfile.TemporaryDirectory() as temporary:
        for folder, tensors in ((base_folder, base), (Path(temporary) / "tuned", tuned)):
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text('{"model_type": "bert", "dtype": "float32"}')
        compress_folder(Path(temporary) / "tuned", path, options, base=base_folder)
    found = content(load_state_dict(path, base=base_folder))
    assert not options.exact or found == content(tuned)
    return found


def make_network(path: Path) -> dict[str, str]:
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))
    specs = (
        SharedSpec("0.weight", "F32", (20, 12), 1, 31),
        SharedSpec("0.bias", "F32", (20,), 0, 20),
        SharedSpec("1.weight", "F32", (20,), 2, 1),
        SharedSpec("2.weight", "F32", (5, 20), 0, 100),
    )
    code = Code(11, 3, 4, seed=2**33 + 7)
    is_split = path.name.startswith("network_2")
    header = NetworkHeader(SplitCode(code, 50, Code(11, 2, 3, code.seed)) if is_split else code, specs)
    message, end = torch.frombuffer(bytearray(torch.arange(17).pow(3).byte().tolist()), dtype=torch.uint8), 0
    message = message.repeat(3)[: header.code.message_bytes(header.n_values)]
    for n_values, own in header.code.segments(header.n_values):
        end += own.message_bytes(n_values)
        message[end - 1] &= 0xFF << (-own.message_bits(n_values) % 8) & 0xFF
    stream, _ = encode_stream_entry(header, torch.tensor([0.5, 0.25, 1.0, 0.125]), message)
    payload = encode_tensor(gaussian(5), [Segment(1, Code(8, 4, 1), False)], 1, where="2.bias")
    plain = {
        "1.bias": gaussian(20),
        "1.running_mean": torch.zeros(20),
        "1.running_var": torch.ones(20),
        "1.num_batches_tracked": torch.tensor(7),
    }
    write_network(path, {"miracle": stream, "2.bias": payload}, plain)
    return content(load(path, model).state_dict())


if __name__ == "__main__":
    listed = GOLDEN / "files.json"
    files = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else {}
    for name in NAMES_OF_FILES:
        if name not in files:
            makers = {"repository": make_repository, "based": make_based, "lossless": make_lossless}
            files[name] = makers.get(name.split("_")[0], make_network)(GOLDEN / name)
    listed.write_text(json.dumps(files, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
