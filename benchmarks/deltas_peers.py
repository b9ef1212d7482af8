"""Peers of benchmarks/deltas.py: what other methods make of the same difference, and in how many bytes.

Their own code is for large language models; here is each method's arithmetic, as its paper states it, with
bytes as its files would have them. What a method leaves dense is counted in bfloat16, as far as the fine-tune
changed it.
"""

import lzma
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# A task of benchmarks/deltas.py, the fine-tune, and the base with its head: → bytes and the model.
Method = Callable[[Any, nn.Module, nn.Module], tuple[int, nn.Module]]
_SEED = 0


def _is_linear(name: str, tensor: Tensor) -> bool:
    """Of attention and MLPs: what these methods compress."""
    return tensor.ndim == 2 and ".layer." in name


@torch.no_grad()
def _with(
    tuned: nn.Module, base: nn.Module, make: Callable[[str, Tensor], tuple[Tensor, float]]
) -> tuple[int, nn.Module]:
    """The fine-tune with differences replaced; bytes of what is not dense come with them.

    Args:
        make: name and difference → what it becomes, and its bytes.
    """
    theirs, n_bytes = dict(base.named_parameters()), 0.0
    for name, own in tuned.named_parameters():
        difference = own - theirs[name]
        if not bool(difference.any()):
            continue
        if _is_linear(name, own):
            found, stored = make(name, difference)
            own.copy_(theirs[name] + found)
            n_bytes += stored
        else:
            own.copy_(own.bfloat16().float())
            n_bytes += 2 * own.numel()
    return round(n_bytes), tuned


def sign_by_row(task: Any, tuned: nn.Module, base: nn.Module) -> tuple[int, nn.Module]:
    """Signs and a scale per row (arXiv:2512.19720, with scales of least squares)."""

    def make(_: str, d: Tensor) -> tuple[Tensor, float]:
        return d.sign() * d.abs().mean(1, keepdim=True), d.numel() / 8 + 2 * len(d)

    return _with(tuned, base, make)


def bitdelta(task: Any, tuned: nn.Module, base: nn.Module) -> tuple[int, nn.Module]:
    """BitDelta (arXiv:2402.10193): signs, and a scale per matrix, distilled to the fine-tune's logits."""
    wanted = task.logits(tuned, "train", 4096).clone()
    theirs = {name: p.detach().clone() for name, p in base.named_parameters()}
    signs: dict[str, Tensor] = {}
    scales: dict[str, nn.Parameter] = {}

    def make(name: str, d: Tensor) -> tuple[Tensor, float]:
        signs[name], scales[name] = torch.where(d < 0, -1.0, 1.0), nn.Parameter(d.abs().mean())
        return signs[name] * scales[name].detach(), d.numel() / 8 + 2

    n_bytes, model = _with(tuned, base, make)
    # Frozen but for scales: the paper's script moves all parameters.
    optimizer = torch.optim.AdamW(scales.values(), lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    others = {name: p.detach() for name, p in model.named_parameters() if name not in scales}
    for step in range(200):
        rows = task.splits["train"][(16 * step) % 4096 : (16 * step) % 4096 + 16]
        batch = task.collator(rows)
        batch.pop("labels")
        weights = {name: theirs[name] + signs[name] * scale for name, scale in scales.items()}
        logits = torch.func.functional_call(model.eval(), {**others, **weights}, kwargs=dict(batch)).logits
        loss = (logits - wanted[(16 * step) % 4096 : (16 * step) % 4096 + 16]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, scale in scales.items():
            own[name].copy_(theirs[name] + signs[name] * scale.bfloat16().float())
    return n_bytes, model


def dare(task: Any, tuned: nn.Module, base: nn.Module) -> tuple[int, nn.Module]:
    """DARE (arXiv:2311.03099): nine of ten differences dropped, the others times ten; which is a seed's."""
    generator = torch.Generator().manual_seed(_SEED)

    def make(name: str, d: Tensor) -> tuple[Tensor, float]:
        kept = torch.rand(d.shape, generator=generator) >= 0.9
        return (10 * d * kept).bfloat16().float(), 2.0 * float(kept.sum())

    return _with(tuned, base, make)


def svd(task: Any, tuned: nn.Module, base: nn.Module) -> tuple[int, nn.Module]:
    """Delta-CoMe (arXiv:2406.08903): singular vectors in 8 bits (2), 3 bits (32), 2 bits (a quarter of all),
    in groups of 128 with 16-bit scales, rounded to nearest instead of GPTQ.
    """

    def make(_: str, d: Tensor) -> tuple[Tensor, float]:
        u, s, v = torch.linalg.svd(d, full_matrices=False)
        left, right, n_bytes = u * s.sqrt(), s.sqrt()[:, None] * v, 0.0
        found, first = torch.zeros_like(d), 0
        for n, bits in ((2, 8), (32, 3), (len(s) // 4, 2)):
            some = slice(first, first + n)
            a, b = (_rounded(x, bits) for x in (left[:, some].T.contiguous(), right[some].contiguous()))
            found += a.T @ b
            n_bytes += (a.numel() + b.numel()) * (bits / 8 + 2 / 128)
            first += n
        return found, n_bytes

    return _with(tuned, base, make)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """To nearest, symmetric, in groups of 128."""
    groups = x.view(-1, 128)
    most = (1 << (bits - 1)) - 0.5
    scale = (groups.abs().amax(1, keepdim=True) / most).clamp(min=1e-12)
    return (((groups / scale - 0.5).round() + 0.5).clamp(-most, most) * scale).view_as(x)


def xz(task: Any, tuned: nn.Module, base: nn.Module) -> tuple[int, nn.Module]:
    """Differences in bfloat16 through xz, the LZMA2 of 7-zip."""
    theirs, parts = dict(base.named_parameters()), []
    with torch.no_grad():
        for name, own in tuned.named_parameters():
            difference = (own - theirs[name]).bfloat16()
            own.copy_(theirs[name] + difference.float())
            words = difference.view(torch.uint8).view(-1, 2)  # the two bytes of all numbers apart
            parts.append(words.T.contiguous().numpy().tobytes())
    return len(lzma.compress(b"".join(parts), preset=6)), tuned


METHODS: dict[str, Method] = {
    "BitDelta": bitdelta,
    "sign, row scales": sign_by_row,
    "DARE 0.9": dare,
    "SVD, mixed bits": svd,
    "xz of bf16": xz,
}
