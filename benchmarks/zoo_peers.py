"""One peer of the zoo, run in an environment of its own: zoo_peers.py METHOD SETTING DENSE OUT ZOO

zoo.py calls it; it writes OUT/model.safetensors, what is left of the dense tensors, and OUT/peer.json with
the bytes of the peer's own whole file. Nothing of miracle-hub is imported. Environments, each a folder under
MIRACLE_PEERS (else ../peers-venv beside the project) named for its method:

    hqq        pip install torch safetensors hqq
    nncodec    pip install torch torchvision safetensors nncodec          builds C++
    gptqmodel  pip install gptqmodel
    llama.cpp  pip install torch transformers gguf safetensors sentencepiece protobuf; and from the source
               package of llama-cpp-python, which brings llama.cpp: its tree as `source`, and what
               `cmake --build … --target llama-quantize llama-imatrix` makes of it in bin/

All matrices are coded, embeddings too, wherever the peer can. GPTQModel and llama.cpp calibrate on the text
that our calibrated rows see. A GGUF counts without the tokenizer in it: everywhere else it lies beside.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo_rounding import GROUP, bytes_of, tensors_of

# Of calibration: 64 sequences of 512 tokens, which a matrix of importances takes minutes for on two cores.
_SEQUENCES, _LENGTH = 64, 512

Coded = tuple[dict[str, Tensor], int, str]


def hqq(bits: int, dense: Path, out: Path, zoo: Path) -> Coded:
    """Half-quadratic quantization by its own defaults, in groups of 64 along rows; scales in float16."""
    state, packed = tensors_of(dense), {}
    for name, tensor in state.items():
        packed[name], state[name] = tensor, tensor
        if tensor.is_floating_point():
            packed[name], state[name] = tensor.half(), tensor.half().float()
        if tensor.is_floating_point() and tensor.ndim >= 2:
            state[name], packed[name], packed[f"{name}.scale"], packed[f"{name}.zero"] = _hqq(tensor, bits)
    return state, bytes_of(packed, out), f"hqq {version('hqq')}, groups of {GROUP}"


def _hqq(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of a tensor; its packed levels, scales and zero points. It packs whole bytes of groups."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

    flat = tensor.float().flatten()
    groups = torch.cat([flat, flat[-1:].expand(-len(flat) % (8 * GROUP))]).reshape(-1, GROUP)
    given = {"group_size": GROUP, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    levels, meta = Quantizer.quantize(groups, nbits=bits, **given)
    scale, zero = meta["scale"].half(), meta["zero"].half()
    found = Quantizer.dequantize(levels, meta | {"scale": scale.float(), "zero": zero.float()})
    return found.flatten()[: len(flat)].reshape(tensor.shape).float(), levels, scale, zero


def nncodec(qp: int, dense: Path, out: Path, zoo: Path) -> Coded:
    """NNCodec with its trellis; one step (qp) for all tensors, its bit stream as the file."""
    from nncodec.nn import decode, encode  # pyright: ignore[reportMissingImports]

    state = tensors_of(dense)
    floats = {name: t.float().numpy() for name, t in state.items() if t.is_floating_point()}
    options = {"qp": qp, "use_dq": True, "verbose": False, "results": str(out)}
    stream = encode(dict(floats), options)
    decoded = decode(stream, options)
    found = {name: torch.as_tensor(decoded[name]).float().reshape(state[name].shape) for name in floats}
    return state | found, len(stream), f"nncodec {version('nncodec')}, dependent quantization"


def gptqmodel(bits: int, dense: Path, out: Path, zoo: Path) -> Coded:
    """GPTQ in groups of 64 with calibration; embeddings stay as they are."""
    # It refuses two cores otherwise; and compiling what decodes a matrix takes minutes and is used once.
    os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]

    packed = out / "gptq"
    config = QuantizeConfig(bits=bits, group_size=GROUP)
    model = GPTQModel.load(str(dense), config, device="cpu", dtype=torch.float16)
    model.quantize(calibration_ids(dense), batch_size=1, backend=BACKEND.TORCH)
    model.save(str(packed))
    n_bytes = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    loaded = GPTQModel.load(str(packed), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    state = {name: t.float() for name, t in loaded.state_dict().items() if name in tensors_of(dense)}
    for name, module in loaded.named_modules():
        if hasattr(module, "dequantize_weight"):
            state[f"{name}.weight"] = module.dequantize_weight().T.float()
    return state, n_bytes, f"gptqmodel {version('gptqmodel')}, groups of {GROUP}"


def calibration_text() -> str:
    """The text that calibrated rows of ours see as well."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MIRACLE_DATA", shared)) / "text" / "calib"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"), reverse=True))


def calibration_ids(dense: Path) -> list[dict[str, list[int]]]:
    """Sequences of one length, spread evenly over the text."""
    from transformers import AutoTokenizer

    text, tokenizer = calibration_text(), AutoTokenizer.from_pretrained(dense)
    pieces = [text[i * len(text) // _SEQUENCES :][: 8 * _LENGTH] for i in range(_SEQUENCES)]
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"][:_LENGTH] for piece in pieces]
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]


def llama_cpp(kind: str, dense: Path, out: Path, zoo: Path) -> Coded:
    """llama-quantize with an importance matrix."""
    import gguf  # pyright: ignore[reportMissingImports]

    half, matrix, file = *_gguf_of(dense, zoo), out / "coded.gguf"
    _tool("llama-quantize", "--imatrix", matrix, half, file, kind, "2")
    reader = gguf.GGUFReader(file)
    tokenizer = sum(
        part.nbytes
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
        for part in field.parts
    )
    state = {}
    for tensor in reader.tensors:
        decoded = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        state |= _renamed(tensor.name, decoded, dense)
    n_bytes = file.stat().st_size - tokenizer
    file.unlink()
    chunks = int(gguf.GGUFReader(matrix).fields["imatrix.chunk_count"].contents())
    by = f"llama.cpp of llama-cpp-python 0.3.36, importance matrix of {chunks} × {_LENGTH} tokens"
    return state, n_bytes, by


def _gguf_of(dense: Path, zoo: Path) -> tuple[Path, Path]:
    """The dense model as float16 GGUF, and its importance matrix; made once."""
    half, matrix = zoo / f"{dense.name}-f16.gguf", zoo / f"{dense.name}-imatrix.gguf"
    if not half.exists():
        script = Path(sys.prefix) / "source" / "convert_hf_to_gguf.py"
        subprocess.run([sys.executable, script, dense, "--outtype", "f16", "--outfile", half], check=True)
    if not matrix.exists():
        text = zoo / "calibration.txt"
        text.write_text(calibration_text(), encoding="utf-8")
        chunks, part = ("--chunks", str(_SEQUENCES), "-c", str(_LENGTH)), matrix.with_suffix(".part.gguf")
        _tool("llama-imatrix", "-m", half, "-f", text, "-o", part, *chunks, "--no-ppl")
        part.rename(matrix)
    return half, matrix


def _tool(name: str, *given: str | Path) -> None:
    subprocess.run([Path(sys.prefix) / "bin" / name, *given], check=True)


# Names of llama.cpp inside a block, and those of transformers.
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _renamed(name: str, tensor: Tensor, dense: Path) -> dict[str, Tensor]:
    """A tensor of a Llama as transformers has it: llama.cpp pairs neighboring rows of q and k, not halves."""
    if not (found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)):
        return {f"{_OUTSIDE[name.removesuffix('.weight')]}.weight": tensor}
    layer, part = found.groups()
    if part in ("attn_q", "attn_k"):
        config = json.loads((dense / "config.json").read_text())
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        rows = tensor.reshape(heads, -1, 2, tensor.shape[1])
        tensor = rows.transpose(1, 2).reshape(tensor.shape)
    return {f"model.layers.{layer}.{_NAMES[part]}.weight": tensor}


METHODS: dict[str, Callable[[str, Path, Path, Path], Coded]] = {
    "hqq": lambda setting, *paths: hqq(int(setting), *paths),
    "nncodec": lambda setting, *paths: nncodec(int(setting), *paths),
    "gptqmodel": lambda setting, *paths: gptqmodel(int(setting), *paths),
    "llama.cpp": llama_cpp,
}


def _peak_mb() -> int:
    """Most resident memory of this process, or of a tool that it ran."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    tools = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(max(int(line.split()[1]), tools) * 1024 / 1e6)


def main() -> None:
    """Run one peer and write what it left and what it says."""
    method, setting, dense, out, zoo = sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:])
    zoo.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    state, n_bytes, by = METHODS[method](setting, dense, out, zoo)
    facts = {
        "bytes": n_bytes,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mb": _peak_mb(),
        "by": by,
    }
    save_file(
        {name: t.contiguous() for name, t in state.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "peer.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
