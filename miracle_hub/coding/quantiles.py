"""The quantile table Q: 65,536 float16 values that turn 16 uniform bits into a normal draw.

Q[u] = float16(Φ⁻¹((u + ½) / 65536)). Shipped as bytes because no library promises the last bit
of an inverse normal distribution function; the SHA-256 is part of the format
(FORMAT.md, "Stream").
"""

import hashlib
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from miracle_hub.errors import ChecksumError

QUANTILES_SHA256 = "c84e2ee9a90a7a594e0c266c687ccb9dbfe20d0c0040f95fe05e2511d533ad11"


@cache
def quantiles() -> Float16[Tensor, " 65536"]:
    """The table, checked against its SHA-256 once per process.

    Raises:
        ChecksumError: the shipped file was altered.
    """
    data = files("miracle_hub.coding").joinpath("quantiles.f16").read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != QUANTILES_SHA256:
        raise ChecksumError(
            f"quantiles.f16: expected SHA-256 {QUANTILES_SHA256}, found {found}; "
            "the installation is damaged: pip install --force-reinstall miracle-hub"
        )
    return torch.from_numpy(np.frombuffer(data, "<f2").copy())


@lru_cache(8)
def quantiles_on(device: torch.device) -> Float16[Tensor, " 65536"]:
    """The table on a device, copied there once."""
    return quantiles().to(device)
