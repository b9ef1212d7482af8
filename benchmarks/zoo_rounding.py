"""Round to nearest in groups of 64, packed into a file: the least that any other method has to beat."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64


def round_folder(source: Path, bits: int, out: Path) -> int:
    """An ordinary folder of what is left of a dense one; returns the bytes of the file of packed levels.

    All matrices get levels, a least value and a step in float16 for every group; vectors are float16; what is
    no floating-point number stays.
    """
    state, packed = tensors_of(source), {}
    for name, tensor in state.items():
        packed[name], state[name] = tensor, tensor
        if tensor.is_floating_point():
            packed[name], state[name] = tensor.half(), tensor.half().float()
        if tensor.is_floating_point() and tensor.ndim >= 2:
            levels, low, step = rounded(tensor, bits)
            packed |= {name: pack(levels, bits), f"{name}.low": low, f"{name}.step": step}
            state[name] = restored(levels, low, step, tensor.shape)
    write_folder(source, state, out)
    return bytes_of(packed, out)


def rounded(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels `[groups, 64]` in uint8, the last one filled up; least value and step `[groups]` in float16."""
    flat = tensor.float().flatten()
    groups = torch.cat([flat, flat[-1:].expand(-len(flat) % GROUP)]).reshape(-1, GROUP)
    low = groups.amin(1).half()
    step = ((groups.amax(1) - low.float()) / (2**bits - 1)).half()
    levels = (groups - low.float()[:, None]) / step.float().clamp_min(1e-8)[:, None]
    return levels.round().clamp(0, 2**bits - 1).to(torch.uint8), low, step


def restored(levels: Tensor, low: Tensor, step: Tensor, shape: torch.Size) -> Tensor:
    """The tensor that levels stand for, in float32."""
    values = low.float()[:, None] + step.float()[:, None] * levels.float()
    return values.flatten()[: shape.numel()].reshape(shape)


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels as bytes, `bits` bits each, nothing between them."""
    each = (levels.flatten()[:, None] >> torch.arange(bits)) & 1
    return torch.from_numpy(np.packbits(each.numpy().flatten(), bitorder="little"))


def bytes_of(packed: dict[str, Tensor], out: Path) -> int:
    """Of a safetensors file of these tensors; `out` names a place beside which it may lie for a moment."""
    file = out.with_name(f"{out.name}-packed.safetensors")
    save_file(packed, file)
    n_bytes = file.stat().st_size
    file.unlink()
    return n_bytes


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a dense folder's files, as they are stored."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def write_folder(source: Path, state: dict[str, Tensor], out: Path) -> None:
    """An ordinary folder of a state, with what lies beside the weights of another one."""
    copy_companions(source, out)
    save_file(
        {name: t.contiguous() for name, t in state.items()}, out / "model.safetensors", {"format": "pt"}
    )


def copy_companions(source: Path, out: Path) -> None:
    """What lies beside the weights."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
