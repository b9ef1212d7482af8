"""Nothing is dropped silently: every file of a source is in the output, coded, or listed with its reason."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import miracle_hub
from miracle_hub.codec.companions import of_source
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.purpose import why_staying
from miracle_hub.codec.report import Report, told_by_reason
from miracle_hub.codec.verification import verify_folder
from miracle_hub.errors import BudgetError, SourceError

Compress = Callable[..., Report]
SaveModel = Callable[..., Path]
MODEL = {
    "first.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),
    "first.bias": torch.ones(64),
}
HEAD = save({"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)})

TRAVELLING = (
    "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab.txt",
    "preprocessor_config.json", "generation_config.json", "modeling_own.py", "tokenizer/vocab.json",
    "model_head.pkl", "voices/a.pt", "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors",
    "value_head.safetensors", "adapter_model.safetensors", "adapter_config.json", "campplus.onnx", "x.bin",
    "3_Dense/tf_model.h5", "1_Pooling/README.md", "LICENSE", "head/model.fp16.safetensors", "spiece.model",
    "spk2info.npz", "sub/deeper/config.json", "weights/optimizer.pt",
)  # fmt: skip
STAYING = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "pytorch_model.fp16.bin", "tf_model.h5", "tf_model-00001-of-00002.h5", "flax_model.msgpack",
    "rust_model.ot", "model.onnx", "onnx/model_quantized.onnx", "onnx/config.json",
    "decoder_model_merged.onnx", "model.onnx_data", "q4.gguf", "Q8_0.GGUF", "consolidated.safetensors",
    "consolidated.00.pth", "original/params.json", "openvino/openvino_model.bin", "coreml/a.mlpackage/x",
    "model.tflite", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json",
    "training_args.bin", "checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt",
    "runs/a/events.out", "events.out.tfevents.1", ".git/config", ".cache/huggingface/x", ".gitattributes",
    "sub/.hidden", "__pycache__/a.pyc",
)  # fmt: skip
# Whose names the output has for its own, or that only a variant's loader reads.
SPECIAL = (
    "README.md",
    "model.fp16.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
)


def put(folder: Path, name: str, data: bytes = b"") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or (HEAD if name.endswith(".safetensors") else json.dumps(name).encode()))
    return path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_a_file_is_for_follows_from_its_name() -> None:
    assert [name for name in TRAVELLING if why_staying(name)] == []
    assert [name for name in STAYING if not why_staying(name)] == []


_PARTS = st.sampled_from([*TRAVELLING, *STAYING, *SPECIAL])
_FREE = st.lists(st.text("ab.-_ ü", min_size=1, max_size=6), min_size=1, max_size=3).map("/".join)
_ODD = _FREE.filter(lambda path: all(part.strip(". ") for part in path.split("/")))
_ENDINGS = st.sampled_from(["", ".bin", ".safetensors", ".pkl", ".json", ".gguf", ".py"])
_NAMES = st.one_of(_PARTS, st.tuples(_ODD, _ENDINGS).map("".join))


def assert_all_accounted_for(source: Path, out: Path, report: Report) -> None:
    """Every file of a source is in OUT byte for byte, coded, or listed, and OUT has nothing from nowhere."""
    coded, rewritten = {"model.safetensors"}, {"config.json"}
    for name in names(source) - coded - rewritten:
        copied = (out / name).is_file() and (out / name).read_bytes() == (source / name).read_bytes()
        assert copied != (name in report.left_out), name
        assert not copied or (name in report.carried) == name.endswith((".safetensors", *OPAQUE)), name
    assert report.left_out.keys() <= names(source) and all(report.left_out.values())
    assert names(out) == names(source) - report.left_out.keys()


OPAQUE = (".bin", ".pt", ".pkl", ".onnx", ".h5", ".npz")


@settings(max_examples=8, deadline=None)
@given(st.sets(_NAMES, max_size=12))
def test_every_file_of_a_random_folder_is_accounted_for(save_anywhere: SaveModel, drawn: set[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source, out, dense = (Path(temporary) / name for name in ("source", "out", "dense"))
        save_anywhere(source, MODEL)
        for name in sorted(drawn):
            is_free = not any((source / parent).is_file() for parent in Path(name).parents)
            if is_free and not (source / name).exists():
                put(source, name)
        copied = sum(
            path.stat().st_size for path in of_source(source, [source / "model.safetensors"]).weights
        )
        report = miracle_hub.compress(source, out, size=3000 + copied, window_bits=8, progress=False)
        (out / "README.md").unlink()
        assert_all_accounted_for(source, out, report)
        assert verify_folder(out, dense=source).defects == ()
        assert inspect_folder(out).file_bytes == report.compressed_bytes
        miracle_hub.decompress(out, dense, progress=False)
        assert names(dense) == names(out)


def test_report_and_card_list_what_is_copied_and_what_is_left_out(model: Path, tmp_path: Path) -> None:
    for name in ("model_head.pkl", "value_head.safetensors", "tf_model.h5", "README.md", "optimizer.pt"):
        put(model, name)
    out, n_bytes = tmp_path / "out", len(HEAD)
    report = miracle_hub.compress(model, out, bits_per_weight=6, window_bits=8, progress=False)
    assert report.left_out == {
        "README.md": "the model card, which is written anew",
        "optimizer.pt": "left by training; loading does not read it",
        "tf_model.h5": "another copy of the same weights, for TensorFlow",
    }
    assert report.carried == {
        "model_head.pkl": "16 bytes as they are, neither opened nor counted in the size",
        "value_head.safetensors": f"{n_bytes} bytes as they are, counted in the size",
    }
    card = (out / "README.md").read_text()
    for line in (*told_by_reason(report.left_out), *told_by_reason(report.carried)):
        assert f"- {line}\n" in card
    assert report.compressed_bytes == n_bytes + (out / "model.safetensors").stat().st_size
    assert inspect_folder(out).bits_per_weight == report.bits_per_weight
    found = {tensor.name: tensor.reason for tensor in inspect_folder(out).tensors}
    assert found["value_head/v_head.summary.weight"] == "beside the model, copied"


def test_safetensors_beside_the_model_stay_behind_only_if_they_hold_the_same_values(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    save_file(tensors, model / "same.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, model / "half.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, model / "ema.safetensors")
    save_file({"norm.weight": tensors["norm.weight"]}, model / "part.safetensors")
    put(model, "text.safetensors", b"no tensors")
    report = compress(model, tmp_path / "out", bits_per_weight=18)
    assert report.carried.keys() == {"ema.safetensors", "part.safetensors"}
    assert {name: why.rpartition(": ")[2] for name, why in report.left_out.items()} == {
        "half.safetensors": "the same values under the same names",
        "same.safetensors": "the same values under the same names",
        "text.safetensors": "no loader can read it",
    }
    assert (
        load_file(tmp_path / "out" / "ema.safetensors")["second.bias"] == 2 * tensors["second.bias"]
    ).all()
    assert verify_folder(tmp_path / "out", dense=model).defects == ()


def test_shards_that_loaders_would_not_read_stay_behind(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    for name in SPECIAL:
        put(model, name)
    report = compress(model, tmp_path / "out")
    assert report.left_out.keys() == set(SPECIAL) and names(tmp_path / "out") == {
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path, outside: path.symlink_to(outside), "found a link that leaves it"),
        (lambda path, outside: path.symlink_to("gone"), "found a link to a file that does not exist"),
        (lambda path, outside: path.symlink_to("folder"), "found a link to a folder, which nobody"),
        (lambda path, outside: path.symlink_to(path), "found a link to a file that does not exist"),
        (lambda path, outside: os.mkfifo(path), "found no regular file"),
        (lambda path, outside: put(path.parent, path.name, b"version https://git-lfs.github.com/spec/v1"),
         "found a pointer of Git LFS to it; run git lfs pull"),
    ],
)  # fmt: skip
def test_what_cannot_travel_is_refused_unless_it_would_stay_behind(
    make: Callable[[Path, Path], object], found: str, model: Path, compress: Compress, tmp_path: Path
) -> None:
    put(model, "folder/file")
    make(model / "model_head.pkl", put(tmp_path, "outside"))
    with pytest.raises(SourceError, match=f"model_head.pkl: expected .*{found}"):
        compress(model, tmp_path / "out")
    (model / "model_head.pkl").unlink()
    make(model / "pytorch_model.bin", tmp_path / "outside")
    assert "pytorch_model.bin" in compress(model, tmp_path / "out").left_out
    if "git" not in str(found).lower():
        make(tmp_path / "out" / "seen.pkl", tmp_path / "outside")
        put(tmp_path / "out", "folder/file")
        with pytest.raises(SourceError, match=f"seen.pkl: expected .*{found}"):
            verify_folder(tmp_path / "out")


def test_verify_finds_a_copy_that_is_missing_or_changed(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    put(model, "2_Dense/pytorch_model.bin")
    put(model, "value_head.safetensors")
    compress(model, out, bits_per_weight=6)
    assert verify_folder(out, dense=model).defects == ()
    put(out, "2_Dense/pytorch_model.bin", b"other")
    (out / "value_head.safetensors").unlink()
    changed, missing = verify_folder(out, dense=model).defects
    assert changed == (
        f"{out}/2_Dense/pytorch_model.bin: expected the bytes of {model}/2_Dense/pytorch_model.bin, found "
        "others; copy it again"
    )
    assert (
        missing == f"{out}: expected value_head.safetensors of {model}, found none; compress the model again"
    )


def test_names_in_copied_files_are_not_taken_for_the_models(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    put(model, "2_Dense/model.safetensors", save({"norm.weight": 5 * tensors["norm.weight"]}))
    compress(model, tmp_path / "out", bits_per_weight=6)
    assert verify_folder(tmp_path / "out", dense=model).defects == ()


def test_a_size_that_copied_files_exceed_says_so(model: Path, compress: Compress, tmp_path: Path) -> None:
    put(model, "ema.safetensors", save({"w": torch.ones(10**4)}))
    with pytest.raises(
        BudgetError, match=r"; 40,\d\d\d bytes of that are not the base's own: copied files or "
    ):
        compress(model, tmp_path / "out", size="10kB")


def test_a_folder_that_cannot_be_read_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    put(model, "closed/file")
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        SourceError, match="closed: expected a folder that can be read, found Permission denied"
    ):
        of_source(model, [model / "model.safetensors"])
