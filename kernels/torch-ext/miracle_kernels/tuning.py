"""Tile sizes: measured ones per device from tuning/<device>.json, else a heuristic. No run-time search."""

import json
from functools import lru_cache
from pathlib import Path

import torch

# For a GPU that nobody has measured. Chosen by counting registers and shared memory in the
# ahead-of-time report (kernels/resources.json): no spills on sm_80 and newer.
# fmt: off
_DEFAULTS: dict[str, dict[str, int]] = {
    "codebook": {"TILE_STATES": 128, "TILE_GROUPS": 2, "num_warps": 4},
    # A table of up to 16 KiB is copied to shared memory once per tile: 2 bytes per weight, 4 where it is
    # converted to float32. 32 weights per thread: 7.8 instructions per weight instead of 10 with 16.
    "decode": {
        "TILE": 8192, "TILE_GENERAL": 2048, "num_warps": 8, "programs_per_processor": 4,
        "largest_shared_bytes": 16384,
    },
    "decode[with_digest=1]": {"TILE": 2048},  # 4,096 spill on sm_90
    # Eight weights per thread: one Philox counter, which more threads would only compute again. Sixteen
    # weights cost Mean-KL's backward pass 180 registers.
    "reparameterize": {"TILE": 1024, "num_warps": 4},
    "reparameterize_backward": {"TILE": 1024, "num_warps": 4},
    "reparameterize_mean_kl": {"TILE": 1024, "num_warps": 4},
    "reparameterize_mean_kl_backward": {"TILE": 1024, "num_warps": 4},
    # One row of x: TILE / 16 columns of 16 rows at a time, 64 weights per thread, whose loop needs up to 128
    # registers: two programs fit.
    "decode_linear[batch=1]": {"programs_per_processor": 2},
    "decode_linear": {
        "TILE": 16384, "TILE_GENERAL": 2048, "TILE_ROWS": 32, "TILE_COLUMNS": 256, "TILE_ROTATION": 8192,
        "num_warps": 8, "num_stages": 2, "programs_per_processor": 1, "largest_shared_bytes": 32768,
    },
    # 512 blocks share the making of a candidate: 5.8 instructions per score on sm_90, 6.8 where 256 do. Parts
    # of 128 take 99 registers, so that two programs fit a processor, parts of 256 take 134.
    "select": {
        "TILE_BLOCKS": 512, "PART_BLOCKS": 128, "TILE_CANDIDATES": 64, "num_warps": 8, "num_stages": 2,
        "programs_per_processor": 2, "largest_splits": 256,
    },
    "select[step_weights=128]": {"TILE_BLOCKS": 128},  # 256 spill on sm_80
    # 32 states of a thread at once, and as many candidates in its registers for good. When ways are drawn, 32
    # spill on sm_90 and 8 on sm_100.
    "slide": {
        "TILE_NODES": 1024, "TILE_STATES": 4096, "TILE_STATES_DRAWN": 2048, "KEPT_CANDIDATES": 8192,
        "num_warps": 4, "programs_per_processor": 8,
        "TILE_MESSAGE": 512, "TILE_COST": 4096,
    },
}
# fmt: on


def tiles(op: str, device: torch.device, **problem: int) -> dict[str, int]:
    """The tile sizes of an op on a device.

    Args:
        problem: what the choice may depend on; an entry `op[name=value]` wins over the entry `op`, and
            the device's file over the heuristic.
    """
    chosen: dict[str, int] = {}
    for table in (_DEFAULTS, _measured(device_name(device))):
        for key in (op, *(f"{op}[{name}={value}]" for name, value in sorted(problem.items()))):
            chosen.update(table.get(key, {}))
    return chosen


def resident_programs(device: torch.device, per_processor: int) -> int:
    """Programs that a persistent kernel starts: so many on each multiprocessor."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 3  # of the interpreter, so that programs take several tiles each there too
    return per_processor * torch.cuda.get_device_properties(device).multi_processor_count


def memory_share(device: torch.device) -> int:
    """Bytes of scratch memory that an op may take: a quarter of what is free, at most 8 GiB."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1 << 26
    return min(8 << 30, torch.cuda.mem_get_info(device)[0] // 4)


def device_name(device: torch.device) -> str:
    """A device as its tuning and result files are named, such as nvidia-h200."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")


@lru_cache(None)
def _measured(name: str) -> dict[str, dict[str, int]]:
    path = Path(__file__).parent / "tuning" / f"{name}.json"
    return json.loads(path.read_text())["tiles"] if path.exists() else {}
