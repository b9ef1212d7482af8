"""The problems that the GPU benchmark measures and predicts."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing to measure.

    Args:
        size: weights; states for codebook, blocks for select; a multiple of `columns` where that is not 0.
        code: L, k, V.
        stage: of reparameterize: forward, backward, or step: both, through autograd.
        target: the ratio to reach, None where a number is only reported; `limit` says that less is better.
        optional: skipped when time runs out.
    """

    op: str
    size: int
    code: tuple[int, int, int] = (12, 2, 1)
    columns: int = 0
    dtype: str = "float32"
    rotation: int = 1
    digest: bool = False
    selection: str = "best"
    batch: int = 1
    stage: str = ""
    target: float | None = None
    limit: bool = False
    optional: bool = False

    @property
    def label(self) -> str:
        """What tells it from the op's other problems."""
        code = ".".join(map(str, self.code))
        rows = self.size // self.columns if self.columns else 0
        return " ".join(part for part in (
            self.stage or (f"L={self.code[0]} V={self.code[2]}" if self.op == "select" else code),
            f"{rows}x{self.columns}" if rows else f"n={self.size}",
            self.dtype if self.op in ("decode", "decode_linear") else "",
            f"rotation={self.rotation}" if self.rotation > 1 else "",
            "digest" if self.digest else "",
            "sample" if self.selection == "sample" else "",
            f"batch={self.batch}" if self.op == "decode_linear" else "",
        ) if part)  # fmt: skip


def _decodes() -> list[Problem]:
    codes = [(12, 2, 1), (12, 4, 2), (12, 1, 1), (12, 4, 1), (10, 2, 1)]
    kinds = [(dtype, rotation) for dtype in ("float32", "bfloat16") for rotation in (1, 128)]
    size, columns = 1 << 27, 8192
    wanted = [Problem("decode", size, code, columns, *kind, target=0.6) for code in codes for kind in kinds]
    more: dict[str, Any] = dict(columns=columns, dtype="bfloat16")
    digests = [Problem("decode", size, rotation=r, digest=True, **more) for r in (1, 128)]
    longer = [Problem("decode", size, code, rotation=128, **more) for code in ((14, 2, 1), (16, 2, 1))]
    philox = [Problem("decode", 1 << 26, code, **more, optional=True) for code in ((20, 2, 1), (20, 20, 8))]
    sizes = [Problem("decode", n, optional=True, **more) for n in (1 << 22, 1 << 24, 1 << 29)]
    return wanted + digests + longer + philox + sizes


def _selects() -> list[Problem]:
    main = [Problem("select", 1 << 16, (20, 20, 32), selection=s, target=0.4) for s in ("best", "sample")]
    shorter = [Problem("select", 1 << 16, (bits, bits, 32)) for bits in (12, 16)]
    return main + shorter + [Problem("select", 1 << 20, (16, 16, 8), optional=True)]


def _slides() -> list[Problem]:
    main = Problem("slide", 1 << 27, target=1.0)
    others = [((10, 2, 1), 27), ((14, 2, 1), 24), ((12, 4, 2), 25), ((12, 1, 1), 26), ((16, 2, 1), 22)]
    rest = [Problem("slide", 1 << bits, code, optional=bits == 22) for code, bits in others]
    return [main, *rest, Problem("slide", 1 << 24, selection="sample")]


def _reparameterizations() -> list[Problem]:
    found = []
    for op in ("reparameterize", "reparameterize_mean_kl"):
        for stage in ("forward", "backward"):
            found.append(Problem(op, 1 << 26, stage=stage, target=1.3, limit=True))
        found.append(Problem(op, 1 << 26, stage="step", target=3.0))
        found.append(Problem(op, 1 << 22, stage="step", optional=True))
    return found


def _linears() -> list[Problem]:
    square: dict[str, Any] = dict(columns=8192, dtype="bfloat16", rotation=128)
    codes = ((12, 2, 1), (12, 4, 2), (12, 8, 4))
    one = [Problem("decode_linear", 1 << 26, code, target=2.0, **square) for code in codes]
    more = [Problem("decode_linear", 1 << 26, batch=n, **square) for n in (4, 16, 64)]
    more += [
        Problem("decode_linear", 1 << 26, (12, 8, 4), batch=n, optional=True, **square) for n in (16, 64)
    ]
    wide: dict[str, Any] = dict(square, columns=14336)
    more += [Problem("decode_linear", 4096 * 14336, code, **wide) for code in codes[:2]]
    return one + more


PROBLEMS: list[Problem] = [
    Problem("codebook", 1 << 24, (24, 24, 32), target=0.5),
    Problem("codebook", 1 << 26, (24, 24, 8), target=0.5),
    Problem("codebook", 1 << 24, (24, 24, 1)),
    Problem("codebook", 1 << 16, (16, 16, 1), optional=True),
    *_decodes(),
    *_selects(),
    *_slides(),
    *_reparameterizations(),
    *_linears(),
]
