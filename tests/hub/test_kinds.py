"""The one detector: every verb that does not take a source says what it found, and the way out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import miracle_hub
from miracle_hub.codec.detector import detect
from miracle_hub.codec.kinds import Kind
from miracle_hub.errors import MissingWeightsError, PickleRefusedError, SourceError, SourceKindError

WEIGHTS = {
    "layer.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),
    "layer.bias": torch.ones(64),
}
BERT: dict[str, Any] = {"model_type": "bert"}
WORDS = torch.zeros(16, 64, dtype=torch.int32)
BYTES = torch.zeros(64, 32, dtype=torch.uint8)
SCALES = torch.ones(64)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def folder_of(files: dict[str, Any]) -> Callable[[Path], Path]:
    """What makes a folder of files: tensors, JSON, or bytes."""

    def make(folder: Path) -> Path:
        folder.mkdir()
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors") and isinstance(content, dict):
                save_file(content, path, {"format": "pt"})
            else:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return folder

    return make


def dense(config: dict[str, Any] = BERT, tensors: dict[str, Tensor] = WEIGHTS, **others: Any) -> Any:
    named = {name.replace("_json", ".json"): content for name, content in others.items()}
    return folder_of({"config.json": config, "model.safetensors": tensors, **named})


def single(name: str, content: bytes) -> Callable[[Path], Path]:
    """What makes one file in place of a folder."""

    def make(folder: Path) -> Path:
        return folder_of({name: content})(folder) / name

    return make


LORA = {
    "unet.lora_down.weight": SCALES.clone(),
    "unet.lora_up.weight": SCALES.clone(),
    "unet.alpha": torch.ones(()),
}
GPTQ = {"layer.qweight": WORDS, "layer.qzeros": WORDS.clone(), "layer.scales": SCALES}
# Name → the kind, what makes it, and what every message about it says besides.
SOURCES: dict[str, tuple[Kind, Callable[[Path], Path], str]] = {
    "gguf": (
        Kind.GGUF,
        folder_of({"model-q4.gguf": b"GGUF\3", "config.json": BERT}),
        'gguf_file="model-q4.gguf"',
    ),
    "gguf in capitals": (Kind.GGUF, folder_of({"MODEL-Q4.GGUF": b"GGUF\3"}), 'gguf_file="MODEL-Q4.GGUF"'),
    "gguf in subfolders": (Kind.GGUF, folder_of({"q4/m.gguf": b"GGUF\3"}), 'gguf_file="q4/m.gguf"'),
    "gguf file": (Kind.GGUF, single("model-q4.gguf", b"GGUF\3\0\0\0"), 'gguf_file="model-q4.gguf"'),
    "gguf file of another name": (Kind.GGUF, single("model", b"GGUF\3\0\0\0"), "GGUF weights (model)"),
    "onnx": (Kind.ONNX, folder_of({"model.onnx": b"\x08", "config.json": BERT}), "ONNX export (model.onnx)"),
    "onnx in its folder": (Kind.ONNX, folder_of({"onnx/model.onnx": b"\x08"}), "ONNX export"),
    "onnx file": (Kind.ONNX, single("model.onnx", b"\x08\x07"), "ONNX export"),
    "pickle": (
        Kind.PICKLE,
        folder_of({"pytorch_model.bin": b"\x80", "config.json": BERT}),
        "pytorch_model.bin",
    ),
    "pickle beside others": (
        Kind.PICKLE,
        folder_of({"pytorch_model.bin": b"\x80", "tf_model.h5": b"\x89", "m.onnx": b""}),
        "can run code",
    ),
    "pickle of another name": (Kind.PICKLE, folder_of({"ckpt.pt": b"PK"}), 'torch.load("ckpt.pt", weights_o'),
    "pickle file": (Kind.PICKLE, single("model.pt", b"PK\3\4 not to be opened"), "can run code when opened"),
    "tensorflow": (
        Kind.TENSORFLOW,
        folder_of({"tf_model.h5": b"\x89HDF", "config.json": BERT}),
        "from_tf=True",
    ),
    "tensorflow checkpoint": (
        Kind.TENSORFLOW,
        folder_of({"bert_model.ckpt.index": b"", "bert_model.ckpt.data-00000-of-00001": b""}),
        "TensorFlow weights",
    ),
    "keras": (
        Kind.TENSORFLOW,
        folder_of({"model.weights.h5": b"\x89HDF"}),
        "with the library that made them",
    ),
    "flax": (Kind.FLAX, folder_of({"flax_model.msgpack": b"\x82", "config.json": BERT}), "from_flax=True"),
    "openvino": (
        Kind.EXPORT,
        folder_of({"openvino_model.bin": b"", "openvino_model.xml": b""}),
        "exported from",
    ),
    "numpy": (Kind.ARRAYS, folder_of({"weights.npz": b"PK\3\4", "config.json": BERT}), "numpy arrays"),
    "adapter": (
        Kind.PEFT,
        folder_of({"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.safetensors": WEIGHTS}),
        "found an adapter of PEFT (adapter_model.safetensors); compress it, or, for what needs a model",
    ),
    "adapter as pickle": (
        Kind.ADAPTER,
        folder_of({"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.bin": b"\x80"}),
        "merge_and_unload()",
    ),
    "adapter with a model's config": (
        Kind.ADAPTER,
        folder_of({"adapter_config.json": {}, "adapter_model.safetensors": WEIGHTS, "config.json": BERT}),
        "merge it",
    ),
    "adapter under a model's name": (
        Kind.ADAPTER,
        folder_of({"model.safetensors": WEIGHTS, "adapter_config.json": {}}),
        "merge it",
    ),
    "adapter by tensors": (Kind.ADAPTER, folder_of({"style.safetensors": LORA}), "an adapter (LoRA, PEFT)"),
    "lora of diffusers": (
        Kind.ADAPTER,
        folder_of({"pytorch_lora_weights.safetensors": WEIGHTS}),
        "pytorch_lora_weights",
    ),
    "pipeline": (
        Kind.PIPELINE,
        folder_of({"model_index.json": {}, "unet/diffusion_pytorch_model.safetensors": WEIGHTS}),
        "a diffusers pipeline",
    ),
    "pipeline with one more file": (
        Kind.PIPELINE,
        folder_of({"model_index.json": {}, "sd.safetensors": WEIGHTS}),
        "model_index.json",
    ),
    "component": (
        Kind.COMPONENT,
        folder_of({"config.json": {"_class_name": "X"}, "diffusion_pytorch_model.safetensors": WEIGHTS}),
        "a component of a diffusers pipeline",
    ),
    "component of a variant": (
        Kind.COMPONENT,
        folder_of({"diffusion_pytorch_model.fp16.safetensors": WEIGHTS}),
        "load_state_dict",
    ),
    "component of another name": (Kind.COMPONENT, dense({"_class_name": "AutoencoderKL"}), "diffusers"),
    "mistral's own": (
        Kind.ORIGINAL,
        folder_of({"consolidated.safetensors": WEIGHTS, "params.json": {}}),
        "their maker's own",
    ),
    "weights in subfolders": (
        Kind.NESTED,
        folder_of({"modules.json": {}, "0_Transformer/model.safetensors": WEIGHTS}),
        "/0_Transformer)",
    ),
    "clone without lfs": (
        Kind.POINTER,
        folder_of({"model.safetensors": POINTER, "config.json": BERT}),
        "git lfs pull",
    ),
    "mlx": (
        Kind.QUANTIZED,
        dense({**BERT, "quantization": {"group_size": 64, "bits": 4}}),
        "'mlx' (quantization)",
    ),
    "mlx by tensors": (
        Kind.QUANTIZED,
        dense(tensors={"l.weight": WORDS.view(torch.uint32), "l.scales": SCALES, "l.biases": SCALES.clone()}),
        "(tensor l.weight)",
    ),
    "old bitsandbytes, 4 bits": (
        Kind.QUANTIZED,
        dense({**BERT, "quantization_config": {"load_in_4bit": True}}),
        "'bitsandbytes'",
    ),
    "old bitsandbytes, 8 bits": (
        Kind.QUANTIZED,
        dense({**BERT, "load_in_8bit": True}),
        "'bitsandbytes' (load_in_8",
    ),
    "bitsandbytes by tensors": (
        Kind.QUANTIZED,
        dense(tensors={"l.weight": BYTES, "l.weight.absmax": SCALES}),
        "'bitsandbytes' (tensor",
    ),
    "int8 by tensors": (
        Kind.QUANTIZED,
        dense(tensors={"l.weight": BYTES.to(torch.int8), "l.SCB": SCALES}),
        "'bitsandbytes'",
    ),
    "gptq": (
        Kind.QUANTIZED,
        dense({**BERT, "quantization_config": {"quant_method": "gptq", "bits": 4}}, GPTQ),
        "'gptq'",
    ),
    "gptq in a file of its own": (
        Kind.QUANTIZED,
        dense(quantize_config_json={"bits": 4}),
        "quantize_config.json",
    ),
    "gptq by tensors": (Kind.QUANTIZED, dense(tensors=GPTQ), "'gptq or awq' (tensor layer.qweight)"),
    "awq": (Kind.QUANTIZED, dense(quant_config_json={"w_bit": 4}), "quant_config.json: expected"),
    "modelopt": (Kind.QUANTIZED, dense(hf_quant_config_json={"quantization": {}}), "'modelopt'"),
    "compressed-tensors": (
        Kind.QUANTIZED,
        dense({**BERT, "compression_config": {"config_groups": {}}}),
        "'compressed-tensors'",
    ),
    "compressed-tensors by tensors": (
        Kind.QUANTIZED,
        dense(tensors={"l.weight_packed": WORDS, "l.weight_scale": SCALES}),
        "'compressed-tensors'",
    ),
    "nested in text_config": (
        Kind.QUANTIZED,
        dense({**BERT, "text_config": {"quantization_config": {"quant_method": "fp8"}}}),
        "'fp8'",
    ),
    "no method": (Kind.QUANTIZED, dense({**BERT, "quantization_config": {"bits": 4}}), "an unnamed method"),
    "fp8": (
        Kind.QUANTIZED,
        dense(tensors={"l.weight": BYTES.to(torch.float8_e4m3fn), "l.weight_scale_inv": SCALES}),
        "(tensor l.weight",
    ),
    "pickle of a quantized model": (
        Kind.QUANTIZED,
        folder_of({"model.bin": b"\x80", "config.json": {"load_in_4bit": True}}),
        "'bitsandbytes'",
    ),
    "empty": (Kind.NOTHING, folder_of({}), "found neither"),
    "config alone": (Kind.NOTHING, folder_of({"config.json": BERT, "tokenizer.json": {}}), "found neither"),
}
VERBS: dict[str, Callable[[Path, Path], object]] = {
    "compress": lambda source, out: miracle_hub.compress(source, out, bits_per_weight=4, progress=False),
    "decompress": lambda source, out: miracle_hub.decompress(source, out, progress=False),
    "inspect": lambda source, out: miracle_hub.inspect(source),
    "verify": lambda source, out: miracle_hub.verify(source).require(),
    "load_state_dict": lambda source, out: miracle_hub.load_state_dict(source),
    "push": lambda source, out: miracle_hub.push(source, "user/name"),
    "fit": lambda source, out: miracle_hub.fit(source, out, data="none.tsv", rate=1.0),
    "certify": lambda source, out: miracle_hub.certify(source, data="none.tsv", fitted=True),
    "compare": lambda source, out: miracle_hub.compare(source, source, data="none.txt"),
}
_CLASSES = {Kind.PICKLE: PickleRefusedError, Kind.NOTHING: MissingWeightsError}


@pytest.mark.parametrize("name", SOURCES)
def test_every_verb_says_what_it_found_and_what_to_do(name: str, tmp_path: Path) -> None:
    kind, make, said = SOURCES[name]
    source = make(tmp_path / "source")
    assert detect(source).kind is kind
    for verb, run in VERBS.items():
        if (kind, verb) == (Kind.QUANTIZED, "compare") or (verb == "push" and source.is_file()):
            continue  # transformers may run it; a push takes folders
        if (kind, verb) == (Kind.PEFT, "compress"):
            continue  # which takes it
        if (kind, verb) == (Kind.NOTHING, "certify"):
            continue  # which says first that it is not compressed
        with pytest.raises(SourceError if verb not in ("verify", "push") else ValueError) as raised:
            run(source, tmp_path / "out")
        message = str(raised.value)
        assert re.match(r"\S+: expected .+, found .+; .+", message) and "\n" not in message, (verb, message)
        assert said in message, (verb, message)
        if (kind, verb) not in (
            (Kind.NOTHING, "verify"),
            (Kind.NOTHING, "push"),
        ):  # defects of what they read
            assert type(raised.value) is _CLASSES.get(kind, SourceKindError), (verb, message)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_was_never_compressed_is_not_inspected_verified_or_pushed(tmp_path: Path) -> None:
    source = dense()(tmp_path / "source")
    bare = folder_of({"model.safetensors": WEIGHTS})(tmp_path / "bare")
    for path in (source, source / "model.safetensors", bare):
        assert detect(path).kind is (Kind.TENSORS if path is bare else Kind.DENSE)
        for verb in ("inspect", "verify"):
            with pytest.raises(SourceKindError) as raised:
                VERBS[verb](path, tmp_path / "out")
            assert str(raised.value) == (
                f"{path}: expected a compressed model, found a dense one without any payload "
                "(model.safetensors); run miracle compress first"
            )
    for verb in ("push", "certify"):
        with pytest.raises(SourceError, match=r"expected a compressed .*run miracle compress"):
            VERBS[verb](source, tmp_path / "out")


def test_what_is_compressed_is_not_compressed_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    VERBS["compress"](dense()(tmp_path / "source"), out)
    assert detect(out).kind is Kind.COMPRESSED
    with pytest.raises(SourceKindError, match="expected a dense model, found one quantized with 'miracle'"):
        VERBS["compress"](out, tmp_path / "again")
    (out / "config.json").unlink()
    assert detect(out).kind is detect(out / "model.safetensors").kind is Kind.PAYLOADS
    assert miracle_hub.inspect(out).tensors and miracle_hub.load_state_dict(out)


@pytest.mark.parametrize(
    "make",
    [
        dense({}),
        folder_of({"model.safetensors": WEIGHTS}),
        folder_of({"a.safetensors": WEIGHTS}),
        dense({**BERT, "quantization_config": {"load_in_4bit": False, "load_in_8bit": False}}),
        dense({**BERT, "quantization": None, "compression_config": {}, "vision_config": {"depth": 2}}),
        dense(tensors={**WEIGHTS, "l.weight": torch.ones(4, 4, dtype=torch.int64), "l.scale": SCALES}),
        dense(tensors={**WEIGHTS, "attention.q_weight": torch.ones(8, 8), "vq.codebooks": torch.ones(8, 8)}),
    ],
)
def test_dense_folders_of_any_spelling_are_taken(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    assert detect(source).kind is (Kind.DENSE if (source / "config.json").exists() else Kind.TENSORS)
    report = miracle_hub.compress(source, tmp_path / "out", bits_per_weight=8, window_bits=8, progress=False)
    assert set(miracle_hub.load_state_dict(tmp_path / "out")) >= set(WEIGHTS)
    has_type = (
        "model_type" in json.loads((source / "config.json").read_text())
        if (source / "config.json").exists()
        else False
    )
    assert has_type != any("not for from_pretrained" in note for note in report.notes)


def test_a_damaged_file_is_named_by_its_reader_and_no_kind(tmp_path: Path) -> None:
    source = dense()(tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"\1\2\3")
    assert detect(source).kind is Kind.UNSOUND
    for verb in ("compress", "inspect", "load_state_dict"):
        with pytest.raises(ValueError, match="found 3 bytes that are not"):
            VERBS[verb](source, tmp_path / "out")


@pytest.mark.parametrize("facts", ["fp8", ["fp8"], 8])
def test_a_quantization_config_of_no_known_form_is_named(facts: Any, tmp_path: Path) -> None:
    source = dense({**BERT, "quantization_config": facts})(tmp_path / "source")
    for verb in ("compress", "fit", "compare"):
        with pytest.raises(SourceError, match=r"expected .*, found .*; "):
            VERBS[verb](source, tmp_path / "out")


@pytest.mark.parametrize("verb", ["fit", "compare"])
def test_what_transformers_cannot_know_is_no_model_for_it(verb: str, tmp_path: Path) -> None:
    source = folder_of({"model.safetensors": WEIGHTS})(tmp_path / "source")
    with pytest.raises(SourceError, match=r"expected a model of transformers, .*config\.json, found none"):
        VERBS[verb](source, tmp_path / "out")
