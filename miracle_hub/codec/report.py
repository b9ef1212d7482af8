"""What a compression says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What a compression did.

    Attributes:
        dense_bytes, compressed_bytes: of all safetensors files before and after.
        bits_per_weight: of whole files.
        digest: of the payloads.
        backend: as chosen.
        plain: tensors that are stored plainly, and why.
        budget_bytes: that were asked for; None where a rate was.
    """

    dense_bytes: int
    compressed_bytes: int
    n_weights: int
    bits_per_weight: float
    seconds: float
    digest: str
    backend: str
    plain: Mapping[str, str] = field(default_factory=dict)
    budget_bytes: int | None = None
