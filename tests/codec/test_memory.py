"""Memory grows with the largest tensor, not with the model."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import forks

# VmHWM is this process's own peak; getrusage would hand down the peak of the process that started it.
SCRIPT = """
import sys
from pathlib import Path
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import decompress_folder
from miracle_hub.options import CompressOptions, DecompressOptions

source, small, dense = map(Path, sys.argv[1:])
options = CompressOptions(bits_per_weight=0.5, window_bits=8, max_shard_size="1MB", progress=False)
compress_folder(source, small, options)
decompress_folder(small, dense, DecompressOptions(max_shard_size="20MB", progress=False))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
MEGABYTE = 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_model_of_128_mb_needs_hardly_more_memory_than_one_of_48_mb(
    save_anywhere: Callable[..., Path], tmp_path: Path
) -> None:
    peaks = {}
    generator = torch.Generator().manual_seed(0)
    for n_tensors in (24, 64):
        tensors = {f"layer.{i}.weight": torch.randn(512, 1024, generator=generator) for i in range(n_tensors)}
        source = save_anywhere(tmp_path / f"model{n_tensors}", tensors, shards=5)
        out = [tmp_path / f"{name}{n_tensors}" for name in ("small", "dense")]
        done = forks.run(SCRIPT, source, *out)
        assert done.returncode == 0, done.stderr
        peaks[n_tensors] = int(done.stdout) * 1024
    assert peaks[64] - peaks[24] < 40 * MEGABYTE  # the models differ by 80 MB
