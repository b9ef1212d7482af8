"""The rule of rates that needs no data, on several families: how far models are from dense under each.

    python benchmarks/size_rule.py                                  all cases under all rules: hours
    python benchmarks/size_rule.py --case smollm2 --bits 4 3 --rule "size^0.6" "tied × 4"

The package's own allocation gives rates under a rule, at whole-file bits per weight; then every coded tensor
gets errors of that size (size_rule_cases.py), and answers are compared with the dense model's on dev data: KL
in nats, of the encoder mean 1 − cosine. `--coded` codes in earnest instead, by the rule of the package.
Rows of earlier runs stay in results/size_rule.json unless they are measured again. Models: see zoo_models.py.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import record
import torch
import zoo_encoder
import zoo_language
import zoo_speech
import zoo_vision
from size_rule_cases import Case, Worth
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from zoo_models import MODELS, ZOO, as_module, load

import miracle_hub
from miracle_hub.codec.source import SourceTensor

CASES = {
    case.name: case
    for case in (
        Case("minilm"), Case("stories260k"), Case("smollm2"), Case("stories260k", untied=True),
        Case("resnet20"), Case("whisper-base"), Case("resnet44"), Case("lenet5"),
    )
}  # fmt: skip
_SEEDS = {"smollm2": 1, "whisper-base": 1, "minilm": 1}
_WORDS = {"minilm": 30_522, "smollm2": 49_152, "stories260k": 512, "whisper-base": 51_865}

Row = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """Size to a power; and factors of the word table of a model without a head, with a head of its own (that
    of the head too), and of one that is the head as well.
    """

    exponent: float = 0.6
    headless: float = 1.0
    table: float = 1.0
    head: float = 1.0
    tied: float = 1.0

    def of(self, case: Case) -> Worth:
        """The rule for the tensors of a model."""
        return lambda source: source.n_weights**self.exponent * self._factor(case, source)

    def _factor(self, case: Case, source: SourceTensor) -> float:
        if len(source.shape) != 2 or source.shape[0] != _WORDS.get(case.of):
            return 1.0
        if MODELS[case.of].kind == "encoder":
            return self.headless
        if not case.untied:
            return self.tied
        return self.head if source.name.startswith("lm_head") else self.table


RULES = {
    "size^0.6": Rule(),
    **{f"size^{exponent:g}": Rule(exponent) for exponent in (-0.3, 0.0, 0.3, 0.4, 0.8, 1.0)},
    **{f"tied × {factor:g}": Rule(tied=factor) for factor in (2.0, 4.0, 8.0)},
    **{f"words of an encoder × {factor:g}": Rule(headless=factor) for factor in (0.5, 2.0, 4.0)},
    **{f"head × {factor:g}": Rule(head=factor) for factor in (2.0, 4.0)},
    **{f"head × 4, table × {factor:g}": Rule(head=4.0, table=factor) for factor in (0.5, 2.0)},
}


def divergence(case: Case, state: dict[str, Tensor]) -> float:
    """From the dense model, on a part of the dev data."""
    folder, dense = load(case.of)
    module, kind = _module(case, state), MODELS[case.of].kind
    if kind == "encoder":
        return float(1 - (_dense_answers(case.of) * _answers(case.of, module)).sum(1).mean())
    if kind == "vision":
        return zoo_vision.compared(_answers(case.of, module), _dense_answers(case.of))["kl"]
    if kind == "speech":
        return zoo_speech.measure(module, dense, folder, "dev", True, cache_folder=ZOO / "speech")["kl"]
    n, windows = _WINDOWS[case.of]
    ids = windows(folder, "dev")[:n]
    return zoo_language.summary(zoo_language.losses(module, dense, ids), ids.shape[1] - 1)["kl"]


_WINDOWS = {"smollm2": (2, zoo_language.wikitext_windows), "stories260k": (4, zoo_language.story_windows)}


def _module(case: Case, state: dict[str, Tensor]) -> nn.Module:
    if not case.untied:
        return as_module(case.of, state)
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32, tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(state["lm_head.weight"])
    model.load_state_dict(state, strict=False)
    return model.eval()


def _answers(of: str, module: nn.Module) -> Tensor:
    """Embeddings of 167 sentences, or logits of 256 images of CIFAR-10 or 3,000 of MNIST."""
    if MODELS[of].kind == "encoder":
        return zoo_encoder.embeddings(module, load(of)[0], zoo_encoder.sentences("dev")[::6])
    images = zoo_vision.digits("dev", 3000)[0] if of == "lenet5" else zoo_vision.jpeg_images("train", 256)
    return zoo_vision.logits(module, images)


@cache
def _dense_answers(of: str) -> Tensor:
    return _answers(of, load(of)[1])


def row(case: Case, rule: str, bits: float) -> Row:
    """The mean divergence over some seeds of errors."""
    choices, seeds = case.choices(RULES[rule].of(case), bits), range(_SEEDS.get(case.of, 3))
    found = [divergence(case, case.with_errors(choices, seed)) for seed in seeds]
    mean = round(sum(found) / len(found), 5)
    return {"case": case.name, "rule": rule, "bits": bits, "seeds": len(found), "divergence": mean}


def coded_row(case: Case, bits: float) -> Row:
    """The divergence of what the package codes, windows of 12 bits."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coded"
        miracle_hub.compress(
            case.folder, out, bits_per_weight=bits, calibrate=None, window_bits=12, progress=False
        )
        state = {n: t.float() for n, t in miracle_hub.load_state_dict(out).items() if t.is_floating_point()}
    found = round(divergence(case, state), 5)
    return {"case": case.name, "rule": CODED, "bits": bits, "seeds": 1, "divergence": found}


CODED = "coded"
_RESULTS = record.RESULTS / "size_rule.json"


def known() -> list[Row]:
    """Rows of earlier runs."""
    return json.loads(_RESULTS.read_text())["results"]["rows"] if _RESULTS.exists() else []


def keep(found: Row) -> None:
    """Write a row among those of earlier runs at once."""

    def place(row: Row) -> tuple[int, int, float]:
        rules = [*RULES, CODED]
        return [*CASES].index(row["case"]), rules.index(row["rule"]), -row["bits"]

    rows = {place(row): row for row in [*known(), found]}
    record.record("size_rule", {"rows": [rows[at] for at in sorted(rows)]})


def main() -> None:
    """Measure, print and record row after row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rule", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0, 3.0, 2.0])
    parser.add_argument("--coded", action="store_true")
    a = parser.parse_args()
    for case in (CASES[name] for name in a.case):
        for rule in [CODED] if a.coded else a.rule:
            for bits in a.bits:
                found = coded_row(case, bits) if a.coded else row(case, rule, bits)
                print(found, flush=True)
                keep(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
