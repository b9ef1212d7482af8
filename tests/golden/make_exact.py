"""Writes exact payloads, each once, and exact.json: what they hold. python tests/golden/make_exact.py"""

import hashlib
import json
import runpy
from pathlib import Path

import torch
from torch import Tensor

from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.exact import exact_payload

GOLDEN = Path(__file__).parent


def tensors() -> dict[str, Tensor]:
    """Every form, and every dtype."""
    generator = torch.Generator().manual_seed(0)
    tril = torch.tril(torch.ones(40, 40))
    waves = (torch.arange(60.0)[:, None] * 0.9 ** torch.arange(8)).sin()
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 3e38]).repeat(9)
    odd.view(torch.int32)[5] = 0x7FC12345  # a NaN with something in it
    few = torch.randint(0, 5, (300,), generator=generator)
    found = {
        "mask": tril, "infinite": torch.full((5, 20), -torch.inf).triu(1).half(), "waves": waves,
        "odd": odd, "brain": waves.bfloat16(), "double": waves.double().cumsum(0),
        "places": torch.arange(512).view(1, 512) * 3 - 7, "falling": -torch.arange(300).int(),
        "short": (few - 2).short(), "small": (few - 2).to(torch.int8), "bytes": few.byte().view(3, 10, 10),
        "truth": tril.bool().view(1, 1, 40, 40), "high": (few - 3).view(torch.uint64),
        "unsigned": few.to(torch.uint32), "unsigned_short": few.to(torch.uint16),
        "eighth": few.to(torch.float8_e4m3fn), "eighth_wide": few.to(torch.float8_e5m2),
        "complex": torch.polar(torch.ones(70), torch.arange(70.0)), "scalar": torch.tensor(7),
        "constant": torch.zeros(300, 300),
    }  # fmt: skip
    if hasattr(torch, "float8_e8m0fnu"):
        found["exponent"] = few.byte().view(torch.float8_e8m0fnu)
    return found


if __name__ == "__main__":
    listed = GOLDEN / "exact.json"
    contents = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else {}
    decode = runpy.run_path(str(GOLDEN / "exact_decoder.py"))["decode"]
    for name, tensor in tensors().items():
        if name not in contents:
            payload = exact_payload(tensor)
            assert payload is not None
            dtype, shape, raw, _ = decode(payload)
            assert raw == raw_bytes(tensor) and shape == list(tensor.shape)
            contents[name] = [payload.hex(), f"{dtype} {shape} {hashlib.sha256(raw).hexdigest()}"]
    listed.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
