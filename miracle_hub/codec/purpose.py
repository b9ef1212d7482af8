"""What the files beside a model's weights are for, by their names: which stay behind, and why.

The one table of them: `companions` goes by it for a folder, `hub.resolve` for what is not even downloaded.
"""

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from miracle_hub.codec.naming import WEIGHTS_ENDING

_COPY = "another copy of the same weights"
_LEFTOVER = "left by training; loading does not read it"
# Shell patterns of paths relative to the model's folder, in which * crosses folders. What loaders know as the
# weights in another form is a copy right in the folder; under the same name in a subfolder it is a part.
_STAYING: dict[str, tuple[str, ...]] = {
    f"{_COPY}, as pickle": (
        "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.*.bin",
        "pytorch_model.bin.index*.json", "open_clip_pytorch_model.bin",
    ),
    f"{_COPY}, for TensorFlow": (
        "tf_model.h5", "tf_model-*-of-*.h5", "tf_model.*.h5", "tf_model.h5.index.json", "saved_model/*",
        "*model.ckpt.index", "*model.ckpt.meta", "*model.ckpt.data-*", "model.ckpt",
    ),
    f"{_COPY}, for Flax": (
        "flax_model.msgpack", "flax_model-*-of-*.msgpack", "flax_model.*.msgpack",
        "flax_model.msgpack.index.json",
    ),
    f"{_COPY}, as ONNX": (
        "onnx/*", "model*.onnx", "*_model*.onnx", "model*.onnx_data*", "*_model*.onnx_data*",
        "model*.onnx.data", "*_model*.onnx.data",
    ),
    f"{_COPY}, as GGUF": ("*.gguf", "*.ggml", "ggml-*.bin", "*.llamafile"),
    f"{_COPY}, for another runtime": (
        "*.ot", "*.tflite", "*.mlmodel", "*.mlpackage/*", "*.pte", "*.engine", "coreml/*", "openvino/*",
        "openvino_model*", "open_clip_model.safetensors",
    ),
    f"{_COPY}, in their maker's own layout": (
        "original/*", "metal/*", "consolidated*.safetensors", "consolidated*.safetensors.index.json",
        "consolidated*.pth",
    ),
    _LEFTOVER: (
        "checkpoint-*/*", "runs/*", "wandb/*", "mlruns/*", "lightning_logs/*", "global_step*/*",
        "pytorch_model_fsdp*/*", "optimizer_*/*", "*tfevents*", "optimizer.pt", "optimizer.bin",
        "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth", "random_states_*.pkl",
        "trainer_state.json", "training_args.bin",
    ),
    "Python's cache": ("*__pycache__/*", "*.pyc"),
}  # fmt: skip
STAYING_PATTERNS = tuple(pattern for patterns in _STAYING.values() for pattern in patterns)

CARD_ANEW = "the model card, which is written anew"
HIDDEN = "hidden"
VARIANT = f"{_COPY}, in another precision"
OTHER_SHARDS = f"{_COPY}, which loaders do not read beside those that were taken"
INDEX_ANEW = "the index of the weights, written anew where there are several files"
SAME_TENSORS = f"{_COPY}: the same values under the same names"
UNSOUND = "no sound safetensors file: no loader can read it"

# Of files that may hold weights in a form which nobody here opens, or decodes.
_OPAQUE = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".keras", ".msgpack",
    ".onnx", ".onnx_data", ".data", ".pb", ".nemo", ".pdparams",
)  # fmt: skip


def why_staying(path: str) -> str:
    """Why a file of a dense model stays behind, as far as its name tells; empty for one that travels.

    Args:
        path: relative to the model's folder, with slashes; that of a folder ends with one.
    """
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return HIDDEN
    lower = path.lower()
    matching = (why for why, patterns in _STAYING.items() for p in patterns if fnmatchcase(lower, p))
    return next(matching, "")


def how_carried(path: str, n_bytes: int) -> str:
    """What to say of a file that is copied though it holds, or may hold, weights; empty of all others."""
    suffix, size = PurePosixPath(path).suffix.lower(), f"{n_bytes:,} bytes as they are"
    if suffix == WEIGHTS_ENDING:
        return f"{size}, counted in the size"
    return f"{size}, neither opened nor counted in the size" if suffix in _OPAQUE else ""
