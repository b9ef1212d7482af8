"""What a model may come as, by the names of its files; and the error for one that a verb does not take."""

from collections.abc import Collection, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

from miracle_hub.codec.naming import ADAPTER, ADAPTER_CONFIG, CONFIG, INDEX, SINGLE, WEIGHTS_ENDING
from miracle_hub.errors import MissingWeightsError, PickleRefusedError, SourceError, SourceKindError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMED = 4  # files that a message names at most


class Kind(Enum):
    """What a folder, a file or a repository of the Hub is; the value is for people."""

    DENSE = "a dense model"
    TENSORS = "safetensors without a config.json"  # of nobody's model: read for what they hold
    COMPRESSED = "a compressed model"
    PAYLOADS = "compressed tensors without the config.json that names them"
    QUANTIZED = "a quantized model"
    PIPELINE = "a diffusers pipeline"
    COMPONENT = "a component of a diffusers pipeline"
    PEFT = "an adapter of PEFT"
    CODED_ADAPTER = "a compressed adapter of PEFT"
    ADAPTER = "an adapter (LoRA, PEFT) without the model that it adapts"
    ORIGINAL = "weights in their maker's own layout"
    GGUF = "GGUF weights"
    ONNX = "an ONNX export"
    PICKLE = "only pickle weights"
    TENSORFLOW = "TensorFlow weights"
    FLAX = "Flax weights"
    EXPORT = "an export to another runtime"
    ARRAYS = "weights as numpy arrays"
    NESTED = "weights in subfolders only"
    POINTER = "a pointer of Git LFS in place of the weights"
    NOTHING = "no weights"
    UNSOUND = "files that cannot be read"  # whose reader says what is wrong with them


class Found(NamedTuple):
    """What was found.

    Attributes:
        where: the folder, the file that tells it, or the Hub id.
        what: for people; `todo` is the way out.
        files: that tell it.
    """

    kind: Kind
    where: str
    what: str = ""
    todo: str = ""
    files: tuple[str, ...] = ()


# Marks of files that cannot be taken, the first that matches counts. An asterisk does not cross folders.
_MARKS: dict[Kind, tuple[str, ...]] = {
    Kind.PIPELINE: ("model_index.json",),
    Kind.COMPONENT: ("diffusion_pytorch_model*", "diffusion_flax_model*"),
    Kind.ADAPTER: (ADAPTER_CONFIG, "adapter_model.*", "pytorch_lora_weights.*"),
    Kind.ORIGINAL: ("consolidated*.safetensors", "consolidated*.pth"),
    Kind.GGUF: ("*.gguf", "*.ggml", "ggml-*.bin", "*.llamafile"),
    Kind.TENSORFLOW: ("tf_model*.h5", "*.h5", "*.keras", "*.ckpt.index", "saved_model.pb", "saved_model/*"),
    Kind.FLAX: ("flax_model*.msgpack", "*.msgpack"),
    Kind.EXPORT: (
        "*.ot", "*.tflite", "*.mlmodel", "*.mlpackage", "*.pte", "*.engine", "*.nemo", "*.pdparams",
        "openvino_model.*", "openvino/*", "coreml/*",
    ),
    Kind.ONNX: ("*.onnx", "onnx/*.onnx"),
    Kind.ARRAYS: ("*.npz",),
    Kind.PICKLE: tuple(f"*{ending}" for ending in PICKLES),
}  # fmt: skip
# What is told before anything else in the folder is looked at; the others where no pickle tells more.
_FIRST = (Kind.PIPELINE, Kind.COMPONENT, Kind.ADAPTER, Kind.ORIGINAL)
_SAVED = '.save_pretrained("dense"); then compress that'
_MERGE = (
    'merge it into its model: AutoPeftModelForCausalLM.from_pretrained("{path}").merge_and_unload()' + _SAVED
)
# Of Keras and of TensorFlow itself, which transformers never read.
_FOREIGN = (
    "save them as safetensors with the library that made them, or take the same model in the files that "
    "transformers reads (model.safetensors and config.json)"
)
_TODO: dict[Kind, str] = {
    Kind.PIPELINE: "nothing loads a compressed pipeline; compress those of its parts that are models of "
    "transformers, such as its text encoder ({path}/text_encoder), each as a folder of its own",
    Kind.COMPONENT: "diffusers cannot load it compressed; for its tensors alone put the safetensors file, "
    "renamed to model.safetensors, into a folder of its own, whose result miracle_hub.load_state_dict reads",
    Kind.PEFT: f"compress it, or, for what needs a model, {_MERGE}",
    Kind.CODED_ADAPTER: f"decompress it first, or, for what needs a model, {_MERGE}",
    Kind.ADAPTER: _MERGE,
    Kind.ORIGINAL: "take the files of the same model that transformers reads (model.safetensors and "
    "config.json), or convert them with the script of its architecture in transformers",
    Kind.GGUF: 'transformers reads it (pip install gguf): AutoModelForCausalLM.from_pretrained("{folder}", '
    f'gguf_file="{{file}}"){_SAVED}, or better the model that it was made from',
    Kind.ONNX: "compress the model that it was exported from",
    Kind.TENSORFLOW: 'transformers 4 converts them: AutoModel.from_pretrained("{folder}", from_tf=True)'
    + _SAVED,
    Kind.FLAX: 'transformers 4 converts them: AutoModel.from_pretrained("{folder}", from_flax=True)' + _SAVED,
    Kind.EXPORT: "compress the model that it was exported from",
    Kind.ARRAYS: "save them as safetensors: safetensors.torch.save_file(tensors, 'folder/model.safetensors')",
    Kind.NESTED: "compress the folder that holds the model ({inner}), and put the result in its place",
    Kind.POINTER: "run git lfs pull in the clone, or download the model with hf download",
}


def kind_of_names(where: str, names: Sequence[str]) -> Found:
    """What a folder or repository without model.safetensors is, by the paths of its files.

    Args:
        names: relative, with slashes; hidden ones do not matter.
    """
    names = sorted(name for name in names if not name.startswith(".") and "/." not in name)
    for kind, patterns in _ordered(names).items():
        if files := [name for name in names if any(_is_like(name, pattern) for pattern in patterns)]:
            return found(kind, where, files)
    inner = [name for name in names if "/" in name and name.endswith((WEIGHTS_ENDING, "pytorch_model.bin"))]
    return found(Kind.NESTED, where, inner) if inner else _kind_of_inner(where, names)


def _kind_of_inner(where: str, names: Sequence[str]) -> Found:
    """The same, of what lies in subfolders only, as GGUF files of one rate each often do."""
    for kind, patterns in _MARKS.items():
        if files := [name for name in names if any(_is_like(name.split("/")[-1], p) for p in patterns)]:
            return found(kind, where, files)
    return Found(Kind.NOTHING, where)


def _ordered(names: Sequence[str]) -> dict[Kind, tuple[str, ...]]:
    """The marks in the order in which they count: pickle weights of transformers before exports of them."""
    if not any(_is_like(name, "pytorch_model*.bin") for name in names):
        return _MARKS
    first = {kind: _MARKS[kind] for kind in (*_FIRST, Kind.PICKLE)}
    return {**first, **_MARKS}


def told_by_names(where: str, names: Sequence[str]) -> Found | None:
    """The same, or None where there are safetensors to look into."""
    right_here = [name for name in names if name.endswith(WEIGHTS_ENDING) and "/" not in name]
    is_read = SINGLE in names or INDEX in names or not all(map(is_other_kind, right_here))
    is_other = not {"model_index.json", ADAPTER_CONFIG}.isdisjoint(names) and CONFIG not in names
    if is_adapter_by_names(names):
        return None
    return None if is_read and not is_other else kind_of_names(where, names)


def is_adapter_by_names(names: Collection[str]) -> bool:
    """Whether files are those of an adapter of PEFT in safetensors, without a model's."""
    return {ADAPTER_CONFIG, ADAPTER} <= {*names} and {CONFIG, SINGLE, INDEX}.isdisjoint(names)


def is_other_kind(name: str) -> bool:
    """Whether safetensors of this name are those of an adapter, of diffusers or of a maker."""
    return any(_is_like(name, pattern) for kind in _FIRST for pattern in _MARKS[kind])


def found(kind: Kind, where: str, files: Sequence[str]) -> Found:
    """Something that is told by files, with the way out."""
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    folder, file = where, next(iter(files), "")
    if PurePosixPath(where).name == file:
        folder = str(PurePosixPath(where).parent)
    inner = f"{where}/{PurePosixPath(file).parent}"
    is_foreign = kind is Kind.TENSORFLOW and not _is_like(file, "tf_model*.h5")
    todo = _FOREIGN if is_foreign else _TODO.get(kind, "")
    todo = todo.format(path=where, folder=folder, file=file, inner=inner)
    return Found(kind, where, f"{kind.value} ({', '.join(files[:_NAMED])}{more})", todo, tuple(files))


def refusal(expected: str, found: Found) -> SourceError:
    """The error for what is not taken.

    Args:
        expected: what would be.
    """
    where = found.where
    if found.kind is Kind.NOTHING:
        return MissingWeightsError(
            f"{where}: expected model.safetensors or model.safetensors.index.json, found neither; "
            "pass a folder written by save_pretrained, or a Hub id"
        )
    if found.kind is Kind.PICKLE:
        return PickleRefusedError(
            f"{where}: expected model.safetensors, found only pickle weights ({', '.join(found.files)}), "
            "which can run code when opened; convert them once where you trust them: "
            f"{_conversion(found.files)}"
        )
    return SourceKindError(f"{where}: expected {expected}, found {found.what}; {found.todo}")


def _conversion(pickles: Sequence[str]) -> str:
    """What makes safetensors of pickle: transformers, if they have its names."""
    if any(_is_like(name.split("/")[-1], "pytorch_model*.bin") for name in pickles):
        return "AutoModel.from_pretrained(source).save_pretrained(folder)"
    return (
        f'torch.load("{pickles[0]}", weights_only=True), whose tensors safetensors.torch.save_file writes to '
        '"folder/model.safetensors"'
    )


def _is_like(name: str, pattern: str) -> bool:
    """Whether a path, in any case, matches a shell pattern folder by folder; saved_model/* takes the first
    level below.
    """
    parts, patterns = name.lower().split("/"), pattern.lower().split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
