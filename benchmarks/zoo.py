"""The zoo: model × bits × method → quality on test, distance to dense, bytes of the whole file, time, memory.

    python benchmarks/zoo.py                                   everything that can run here: hours
    python benchmarks/zoo.py --model smollm2 --method data-free round-to-nearest --bits 4 3 2
    python benchmarks/zoo.py --model smollm2 --method hqq gptqmodel llama.cpp
    python benchmarks/zoo.py --model smollm2 --method data-free --equal-to llama.cpp hqq
    python benchmarks/zoo.py --split dev --quick               to try out; records nothing

Rows of earlier runs stay in results/zoo.json unless they are measured again. `--split dev` writes
results/zoo-dev.json, for choosing settings. Every candidate is evaluated from its written folder, through the
same code. Models: see zoo_models.py; peers, which need environments of their own: see zoo_peers.py.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from zoo_methods import Made, measured, ours, peer, round_to_nearest
from zoo_models import MODELS, SPLITS, dense_folder, evaluate, n_weights
from zoo_rows import OURS, Row, keep, key, known

# Settings of a method, where --bits says nothing; those of llama.cpp and NNCodec are no bits.
SETTINGS = {
    **{method: ("4", "3", "2") for method in (*OURS, "round-to-nearest", "hqq", "gptqmodel")},
    "llama.cpp": ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS", "IQ1_S"),
    "nncodec": ("-32", "-28", "-24", "-20", "-16"),
}
_IN_BITS = (*OURS, "round-to-nearest", "hqq", "gptqmodel")

# As record.py has it: the commit that was there when the program was read.
_COMMIT = record.commit()


def make(name: str, method: str, setting: str, out: Path, a: argparse.Namespace) -> Made:
    """One candidate in `out`."""
    if method in OURS:
        return measured(ours, name, method, _budget(name, setting, a.split), out, options(a))
    if method == "round-to-nearest":
        return measured(round_to_nearest, name, int(setting), out)
    return peer(name, method, setting, out)


def options(a: argparse.Namespace) -> dict[str, Any]:
    """Of `compress`, those that were given."""
    given = {"window_bits": a.window_bits, "effort": a.effort}
    return {name: value for name, value in given.items() if value is not None}


def _budget(name: str, setting: str, split: str) -> dict[str, Any]:
    """Bits per weight, or, of a setting such as "= hqq 4", exactly the bytes of that row."""
    if not setting.startswith("= "):
        return {"bits_per_weight": float(setting)}
    _, method, of = setting.split(" ", 2)
    (row,) = [row for row in known(split) if key(row) == (name, method, of)]
    return {"size": row["bytes"]}


def settings(name: str, method: str, a: argparse.Namespace) -> list[str]:
    """What a method is to be run at."""
    if a.equal_to:
        of = [row for row in known(a.split) if row["model"] == name and row["method"] in a.equal_to]
        return [f"= {row['method']} {row['setting']}" for row in of if row["bytes"]] if method in OURS else []
    if method in _IN_BITS and a.bits:
        return [f"{bits:g}" for bits in a.bits if method in OURS or bits == int(bits)]
    return list(a.setting or SETTINGS[method])


def run(name: str, method: str, setting: str, a: argparse.Namespace) -> Row:
    """Make one candidate and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "candidate"
        made = make(name, method, setting, out, a)
        quality = evaluate(name, out, a.split, a.quick) if made.bytes else {}
    return _row(name, method, setting, made, quality)


def _row(name: str, method: str, setting: str, made: Made, quality: dict[str, float]) -> Row:
    rate = {"bits_per_weight": round(8 * made.bytes / n_weights(name), 4)} if made.bytes else {}
    head = {"model": name, "method": method, "setting": setting}
    return {**head, **made._asdict(), **rate, "quality": quality, "commit": _COMMIT}


def dense_row(name: str, a: argparse.Namespace) -> Row:
    """The model as it was, in the bytes of its files."""
    n_bytes = sum(path.stat().st_size for path in dense_folder(name).glob("*.safetensors"))
    quality = evaluate(name, dense_folder(name), a.split, a.quick)
    return _row(name, "dense", "", Made(n_bytes, 0.0, 0, ""), quality)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=["dense", *SETTINGS], default=["dense", *SETTINGS])
    parser.add_argument("--bits", nargs="+", type=float, help="for ours, round-to-nearest, hqq and gptqmodel")
    parser.add_argument("--setting", nargs="+", help="for llama.cpp (types) and nncodec (qp, such as -24)")
    parser.add_argument("--equal-to", nargs="+", choices=SETTINGS, help="ours at the bytes of rows of these")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--quick", action="store_true", help="a fraction of the data; records nothing")
    parser.add_argument("--window-bits", type=int, help="of ours")
    parser.add_argument("--effort", type=int, help="of ours")
    parser.add_argument("--threads", type=int, help="of the evaluation")
    return parser.parse_args()


def main() -> None:
    """Measure, print and record row after row."""
    a = arguments()
    if a.threads:
        torch.set_num_threads(a.threads)
    for name in a.model:
        for method in a.method:
            rows = (
                run(name, method, of, a) for of in (settings(name, method, a) if method != "dense" else [])
            )
            for row in [dense_row(name, a)] if method == "dense" else rows:
                print(row, flush=True)
                if not a.quick:
                    keep(row, a.split)


if __name__ == "__main__":
    main()
