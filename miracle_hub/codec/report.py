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
        exact: tensors that are no weights and keep every bit in fewer bytes, and why.
        kept_bytes: of plain and exact tensors together.
        judged_by: what says which tensors are weights: the model's class, or values alone and why.
    """

    dense_bytes: int
    compressed_bytes: int
    n_weights: int
    bits_per_weight: float
    seconds: float
    digest: str
    backend: str
    plain: Mapping[str, str] = field(default_factory=dict)
    exact: Mapping[str, str] = field(default_factory=dict)
    kept_bytes: int = 0
    judged_by: str = ""

    @property
    def kept_share(self) -> float:
        """Of the compressed bytes: those of plain and exact tensors."""
        return self.kept_bytes / self.compressed_bytes
