"""What each of two processes does in test_trainer_processes.py, which writes what it found.

Arguments: a folder with a model in `source` and rows in `train.tsv`.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import miracle_hub
from miracle_hub import CodingOptions, MiracleTrainer, code_model, compress_model, posterior_mean
from miracle_hub.files.sealed import crc_of
from tests.hub.test_trainer import ROWS, arguments, classifier
from tests.workers import caught

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
OPTIONS = CodingOptions(groups=3, refit_steps=2)
torch.set_num_threads(1)


def trainer_of(kind: str, rows: Any = ROWS, **options: Any) -> MiracleTrainer:
    torch.manual_seed(RANK)
    model = classifier(parametrization=kind)
    given = arguments(FOLDER / f"trained-{kind}", max_steps=2, **options)
    return MiracleTrainer(model=model, args=given, train_dataset=rows, eval_dataset=ROWS)


def crc(model: Any) -> str:
    return crc_of({name: t.contiguous() for name, t in posterior_mean(model).state_dict().items()}, {})


def trained(kind: str) -> list[Any]:
    """Weights in the end, what the report says, and what an evaluation says afterwards."""
    trainer = trainer_of(kind)
    trainer.train()
    logs, state = FOLDER / f"log-{kind}", FOLDER / f"state-{kind}"
    report = trainer.compress(
        FOLDER / kind, options=OPTIONS, validate=True, checkpoint=state, log_folder=logs,
        distill=kind != "mean-var",
    )  # fmt: skip
    said = caught(lambda: trainer.compress(FOLDER / kind, options=OPTIONS))
    return [crc(trainer.model), asdict(report), trainer.evaluate()["eval_loss"], said]


class Rows(list):
    """Rows of which one process cannot read the last ones."""

    def __getitem__(self, row: Any) -> Any:
        if RANK == 1 and isinstance(row, int) and row > 20:
            raise IndexError("a row that is not there")
        return super().__getitem__(row)


def fails() -> list[str]:
    """Errors of one process while it trains, and while it refits."""
    trainer = trainer_of("test-channel")
    if RANK:
        forward = trainer.model.classifier.forward  # pyright: ignore
        trainer.model.classifier.forward = lambda x: forward(x) * float("nan")  # pyright: ignore
    in_training = caught(trainer.train)
    trainer = trainer_of("test-channel", Rows(ROWS))
    return [in_training, caught(lambda: trainer.compress(FOLDER / "fails", options=OPTIONS))]


def written() -> list[Any]:
    """`compress_model` in all processes, and in the first alone."""
    model = classifier(parametrization="mean-kl")
    code_model(model, options=CodingOptions(groups=1, refit_steps=0), progress=False)
    compress_model(model, FOLDER / "by-all", progress=False)
    if not RANK:
        compress_model(model, FOLDER / "by-one", progress=False)
    return [crc(model), caught(lambda: compress_model(model, FOLDER / "by-all"))]


def fitted() -> list[Any]:
    options: dict[str, Any] = dict(steps=2, groups=2, refit_steps=1, batch_size=4, progress=False)
    found = miracle_hub.fit(FOLDER / "source", FOLDER / "fit", data=FOLDER / "train.tsv", rate=2.0, **options)
    return [found.report.digest, found.coded]


found = {
    **{kind: trained(kind) for kind in ("mean-var", "test-channel")},
    "fails": fails(), "written": written(), "fitted": fitted(),
}  # fmt: skip
(FOLDER / f"found-{RANK}.json").write_text(json.dumps(found))
