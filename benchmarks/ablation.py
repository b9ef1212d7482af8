"""What each ingredient of calibration is worth: files of the same size, made with more and more of it.

    python benchmarks/ablation.py                              small models: about an hour of two cores
    python benchmarks/ablation.py --model stories260k --bits 2

Divergence from dense on dev data, of the written folder as a stranger would load it (see zoo.py).
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import record
import torch
from zoo_models import calibration, dense_folder, evaluate, module_to_run

import miracle_hub
from miracle_hub.calibrate import estimate, recipe
from miracle_hub.calibrate.refits import RefitOptions
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.options import CompressOptions

# Models and the bits per weight at which they are still of use.
CASES = {"stories260k": 2.0, "resnet20": 2.0, "minilm": 1.0, "lenet5": 1.0}
_FIGURES = {"minilm": "distance"}
_EFFORT, _WINDOW = 1, 12


@contextmanager
def _without_feedback() -> Iterator[None]:
    """Rates by what errors cost; where errors are made is left to chance."""
    measured = Sensitivity.curvature

    def plain(self: Sensitivity, *given: Any) -> Any:
        found = measured(self, *given)
        return None if found is None else replace(found, columns=None)

    with patch.object(Sensitivity, "curvature", plain):
        yield


@contextmanager
def _with(**changed: Any) -> Iterator[None]:
    """The options of an effort, some of them others."""
    usual = recipe.refit_options

    def options(*given: Any) -> RefitOptions:
        return replace(usual(*given), **changed)

    with patch.object(recipe, "refit_options", options), patch.object(estimate, "refit_options", options):
        yield


_NO_REFITS: Mapping[str, Any] = {"groups": 1, "steps": 0, "blocks": None}
# Name → what is calibrated on, the effort, and what is changed of it.
VARIANTS: Mapping[str, tuple[str | None, int, tuple[Any, ...]]] = {
    "data-free": (None, 0, ()),
    "rates": ("data", 0, (_without_feedback,)),
    "rates, feedback": ("data", 0, ()),
    "rates, feedback, tuning": ("data", _EFFORT, (lambda: _with(**_NO_REFITS),)),
    "rates, feedback, refits": ("data", _EFFORT, (lambda: _with(end_steps=0),)),
    "rates, refits, tuning": ("data", _EFFORT, (_without_feedback,)),
    "all": ("data", _EFFORT, ()),
    "all, of the model's own inputs": ("self", _EFFORT, ()),
}


def measured(name: str, bits: float, variant: str) -> float:
    """The divergence of one file."""
    data, effort, changes = VARIANTS[variant]
    given = {"calibrate": str(calibration(name)) if data == "data" else data, "effort": effort}
    options = CompressOptions(bits_per_weight=bits, window_bits=_WINDOW, progress=False, **given)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for change in changes:
            stack.enter_context(change())
        out = Path(folder) / "out"
        model = None if data is None else module_to_run(name)
        miracle_hub.compress(dense_folder(name), out, model=model, options=options)
        return evaluate(name, out, "dev", False)[_FIGURES.get(name, "kl")]


def known() -> dict[str, Any]:
    """What earlier runs measured, by model."""
    path = record.RESULTS / "ablation.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def main() -> None:
    """Measure, print and record; models that are not asked for keep what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--bits", type=float, help="per weight, of all these models")
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    for name in a.model:
        bits = a.bits or CASES[name]
        found = {}
        for variant in VARIANTS:
            found[variant] = measured(name, bits, variant)
            print(name, bits, variant, round(found[variant], 4), flush=True)
        record.record("ablation", {**known(), name: {"bits_per_weight": bits, "divergence": found}})


if __name__ == "__main__":
    main()
