"""The zoo in docs/results.md: a table per model, and curves of quality over bytes, peers beside us."""

import json
from dataclasses import dataclass

from zoo_rows import METHODS, MODELS, Row, known


@dataclass(frozen=True)
class Column:
    """A figure of a row's quality: its key, its heading, its digits, and whether less is better."""

    key: str
    heading: str
    digits: int
    falls: bool = True


@dataclass(frozen=True)
class Shown:
    """How a model is shown: what it is, what its columns are, and which of them is drawn."""

    title: str
    told: str
    columns: tuple[Column, ...]
    drawn: Column


_KL = Column("kl", "KL to dense", 4)
_AGREEMENT = Column("agreement", "agreement %", 2, falls=False)
_ACCURACY = Column("accuracy", "accuracy %", 2, falls=False)
_DISTANCE = Column("distance", "1 − cosine", 4)
_STORIES = Column("tinystories_perplexity", "TinyStories", 2)
_PERPLEXITY, _TIMES = Column("perplexity", "perplexity", 2), Column("relative", "of dense", 3)

_CIFAR = "agreement and KL on 10,000 JPEG images of CIFAR-10, accuracy on 1,000 raw ones"
SHOWN = {
    "minilm": Shown(
        "all-MiniLM-L6-v2",
        "STS-B test, Spearman × 100; mean 1 − cosine to the dense embedding of 1,000 sentences of WikiText-2",
        (Column("spearman", "Spearman", 2, falls=False), _DISTANCE),
        _DISTANCE,
    ),
    "smollm2": Shown(
        "SmolLM2-135M-Instruct",
        "WikiText-2 test in token form, 16 windows of 512 tokens that begin anywhere; TinyStories "
        "in 4. The model was of 4 bits once, so figures of 4 bits are no evidence",
        (_PERPLEXITY, _TIMES, _KL, _STORIES),
        _KL,
    ),
    "whisper-base": Shown(
        "whisper-base",
        "16 clips of synthetic speech, nats per token over the dense model's of its own transcripts",
        (Column("nats_over", "nats over dense", 4), _KL, _AGREEMENT),
        _KL,
    ),
    "resnet20": Shown("ResNet-20", _CIFAR, (_AGREEMENT, _ACCURACY, _KL), _AGREEMENT),
    "resnet44": Shown("ResNet-44", _CIFAR, (_AGREEMENT, _ACCURACY, _KL), _AGREEMENT),
    "stories260k": Shown(
        "stories260K", "the 15,330 tokens of TinyStories that are used above", (_PERPLEXITY, _TIMES, _KL), _KL
    ),
    "lenet5": Shown("LeNet-5 (Caffe)", "MNIST test", (_AGREEMENT, _ACCURACY, _KL), _AGREEMENT),
}
# Too bad to tell anything: points beyond are not drawn.
_WORST = {"kl": 8.0, "distance": 1.0, "agreement": 20.0}
_HEAD = """## The zoo

Real models through our methods and others' on one machine (`benchmarks/zoo.py`), each candidate evaluated
from its written folder by the same code, on data that no method saw. Bytes are of whole files with headers.
"Data-free" sees no data, "self" what the model makes by itself, "calibrated" data of the kind; rows "= …"
are ours at exactly the bytes of that row. Round to nearest and HQQ code all matrices in groups of 64, NNCodec
codes all tensors, GPTQModel leaves embeddings in 16 bits, and llama.cpp takes a larger type where rows are no
multiple of 256. A GGUF counts without its tokenizer. Seconds and memory are of one run, many of them on one
core beside a run on the other. EXL3, QTIP, EntQuant and NanoQuant need CUDA and did not run."""


def section() -> str:
    """All tables."""
    rows = known("test")
    found = [table(name, [row for row in rows if row["model"] == name]) for name in MODELS]
    return "\n\n".join([_HEAD, *lacking(rows), *(part for part in found if part)])


def lacking(rows: list[Row]) -> list[str]:
    """What of the zoo no row is of."""
    models, methods = {row["model"] for row in rows}, {row["method"] for row in rows}
    names = [SHOWN[name].title for name in MODELS if name not in models]
    names += [method for method in METHODS if method not in methods]
    return [f"Not measured yet: {', '.join(names)}."] if names else []


def table(name: str, rows: list[Row]) -> str:
    """One model's, or nothing where nothing was measured."""
    if not rows:
        return ""
    shown = SHOWN[name]
    picture = ["", f"![Quality over bytes](figures/{figure(name)}.svg)"] if name in drawn() else []
    columns = " | ".join(column.heading for column in shown.columns)
    lines = [
        f"### {shown.title}",
        *picture,
        "",
        f"{shown.told[0].upper()}{shown.told[1:]}.",
        "",
        f"| method | setting | bytes | bits per weight | {columns} | seconds | memory, MB |",
        "|---" * (6 + len(shown.columns)) + "|",
    ]
    return "\n".join([*lines, *(_line(row, shown) for row in rows)])


def _line(row: Row, shown: Shown) -> str:
    head = f"| {row['method']}{_effort(row)} | {row['setting']} | "
    if row["bytes"] is None:
        return f"{head}did not run here: {row['by']} |" + " |" * (3 + len(shown.columns))
    cells = [f"{row['quality'][column.key]:,.{column.digits}f}" for column in shown.columns]
    cost = ["", ""] if row["method"] == "dense" else [f"{row['seconds']:.0f}", f"{row['peak_mb']:,}"]
    return head + " | ".join([f"{row['bytes']:,}", f"{row['bits_per_weight']:.2f}", *cells, *cost]) + " |"


def _effort(row: Row) -> str:
    """Of a row that was calibrated."""
    if row["method"] not in ("self", "calibrated"):
        return ""
    return f", effort {json.loads(row['by'].removeprefix('miracle-hub '))['effort']}"


def figure(name: str) -> str:
    """A file's name."""
    return f"zoo_{name.replace('-', '_')}"


def drawn() -> list[str]:
    """Models with rows of ours and of somebody else."""
    methods = {name: {row["method"] for row in known("test") if row["model"] == name} for name in MODELS}
    return [
        name for name, found in methods.items() if "data-free" in found and found - {"data-free", "dense"}
    ]


def curves(name: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Per method, (bytes, the figure that is drawn), by bytes; without points that are beyond telling."""
    column, found = SHOWN[name].drawn, []
    for method in METHODS[1:]:
        rows = [
            row for row in known("test") if (row["model"], row["method"]) == (name, method) and row["bytes"]
        ]
        points = [(float(row["bytes"]), float(row["quality"][column.key])) for row in rows]
        worst = _WORST[column.key]
        kept = [point for point in points if (point[1] <= worst if column.falls else point[1] >= worst)]
        if kept:
            found.append((method, sorted(kept)))
    return found
