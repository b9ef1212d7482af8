"""Writes docs/results.md, its figures, and tables of other documents, from benchmarks/results/*.json.

python benchmarks/report.py        (`make docs` calls it)
"""

import re
from pathlib import Path

from ablation_report import section as ablation
from adapters_report import adapters
from calibration_report import section as calibration
from deltas_report import section as deltas
from exact_deltas_report import exact_deltas
from expectations import table as expectations
from figures import PEERS, load, write_figures
from kept_report import section as kept
from record import ROOT
from self_report import section as self_made
from size_rule_report import section as size_rule
from zoo_report import section
from zoo_rows import Row, key, known

RESULTS_PAGE = ROOT / "docs" / "results.md"
README, CHOOSING = ROOT / "README.md", ROOT / "docs" / "choosing.md"
_DENSE_BYTES = {"minilm": 90_868_376, "lenet": 1_724_320, "smollm2": 269_060_280}
_HEAD = """# Results

`make docs` writes this page and its figures from `benchmarks/results/`, whose files have the machine, the
versions and the commit of every run. `make bench` and `make bench-fit` repeat the measurements."""


def minilm() -> str:
    """The table of MiniLM's rates."""
    results = load("minilm")["results"]
    lines = [
        "## A hub model",
        "",
        "![Spearman over bits per weight](figures/rate_quality.svg)",
        "",
        f"all-MiniLM-L6-v2 (22.7 M weights), without calibration, STS-B test Spearman × 100; dense: "
        f"{_DENSE_BYTES['minilm']:,} bytes, {results['dense']['spearman']['test']:.2f}.",
        "",
        "| bits per weight, whole file | bytes | Spearman | compress seconds |",
        "|---|---|---|---|",
    ]
    for row in results["compressed"]:
        score, seconds = f"{row['spearman']['test']:.2f}", f"{row['compress_seconds']:.0f}"
        lines.append(f"| {row['asked']} | {row['bytes']:,} | {score} | {seconds} |")
    return "\n".join([*lines, "", peers()])


def stories() -> str:
    """The table of a causal language model."""
    results = load("stories")["results"]
    lines = [
        "## A causal language model",
        "",
        "stories260K (a Llama of 260,032 weights), without calibration, perplexity on 15,330 tokens of "
        f"TinyStories; dense: {results['dense']['perplexity']:.2f}.",
        "",
        "| bits per weight, whole file | bytes | perplexity |",
        "|---|---|---|",
    ]
    for row in results["compressed"]:
        lines.append(f"| {row['asked']} | {row['bytes']:,} | {row['perplexity']:.2f} |")
    return "\n".join(lines)


def peers() -> str:
    """The table of other methods on the same model and test split."""
    lines = [
        "Other methods on the same model and test split (`benchmarks/peers.py`). All matrices are coded, "
        "word embeddings included, also where a library leaves those dense by itself; vectors count 16 bits "
        "a weight (NNCodec codes them itself); headers count nothing. No method sees data.",
        "",
        "| method | setting | bits per weight | bytes | Spearman |",
        "|---|---|---|---|---|",
    ]
    for name in PEERS:
        found = load(f"peers/{name}")["results"]
        method = name if found["written_by"] == "this script" else f"{name} ({found['written_by']})"
        for row in found["rows"]:
            setting = f"qp {row['setting']}" if name == "nncodec" else f"{row['setting']} bits"
            lines.append(
                f"| {method} | {setting} | {row['bits_per_weight']:.2f} | {row['bytes']:,} | "
                f"{row['spearman']['test']:.2f} |"
            )
    hqq, nf4 = load("peers/loading")["results"]
    loads = "saves and loads it" if hqq["loads"] else f"refuses: {hqq['error']!r}"
    lines += [
        "",
        f"As transformers {nf4['transformers']} itself writes NF4, this model has {nf4['bytes']:,} bytes, "
        f"{nf4['bits_per_weight']:.1f} bits per weight: embeddings and vectors stay dense. With HQQ it "
        f"{loads}.",
    ]
    return "\n".join(lines)


def rate_distortion() -> str:
    """The table of squared errors."""
    rows = load("rate_distortion")["results"]["codes"]
    sliding = [r for r in rows if r["step_bits"] < r["window_bits"]]
    rates = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
    lines = [
        "## The code",
        "",
        "![Decibels above Shannon's bound over the rate](figures/rate_distortion.svg)",
        "",
        "Unit Gaussian source, mean squared error (Shannon's bound is 4^-rate):",
        "",
        "| bits per weight | bound | L = 8 | L = 12 | L = 14 | L = 16 |",
        "|---|---|---|---|---|---|",
    ]
    for rate in rates:
        cells = []
        for window in (8, 12, 14, 16):
            same = [
                r["squared_error"]
                for r in sliding
                if r["bits_per_weight"] == rate and r["window_bits"] == window
            ]
            cells.append(f"{min(same):.4f}")
        lines.append(f"| {rate} | {4.0**-rate:.4f} | " + " | ".join(cells) + " |")
    block = next(r for r in rows if r["step_bits"] == r["window_bits"] == r["step_weights"] == 16)
    lines += ["", f"The block code of 16 bits gives {block['squared_error']:.4f} at 1 bit per weight."]
    return "\n".join(lines)


def speed() -> str:
    """The list of speeds, load times and memory."""
    throughput, memory, load_time = (load(n)["results"] for n in ("throughput", "memory", "load_time"))
    encode = {tuple(r["code"]): r["weights_per_second"] / 1e6 for r in throughput["encode"]}
    decode = {tuple(r["code"]): r["weights_per_second"] / 1e6 for r in throughput["decode"]}
    payload = {r["rotation"]: r["weights_per_second"] / 1e6 for r in throughput["payload"]}
    process, call, warm = (load_time[key] for key in ("process", "from_pretrained", "warm"))
    verify = load("verify_time")["results"]
    machine = load("throughput")["machine"]
    return "\n".join(
        [
            "## Speed and memory",
            "",
            f"On {machine['cores']} cores ({machine['cpu']}):",
            "",
            f"- encode at 2 bits: {encode[12, 2, 1]:.1f} M weights/s with L = 12, {encode[14, 2, 1]:.2f} M "
            f"with L = 14 (default), {encode[16, 2, 1]:.2f} M with L = 16;",
            f"- decode: {decode[12, 2, 1]:.0f} M weights/s (stream, L = 12); whole payloads with digest "
            f"{payload[1]:.0f} M, with rotation {payload[128]:.0f} M;",
            f"- load the 2-bit MiniLM in a fresh process: {process['compressed_seconds']:.2f} s against "
            f"{process['dense_seconds']:.2f} s dense ({process['ratio']:.2f} times); the `from_pretrained` "
            f"call alone {call['ratio']:.2f} times, a repeated call in the same process "
            f"{warm['compressed_seconds']:.2f} s against {warm['dense_seconds']:.2f} s (a dense load only "
            "maps the file);",
            f"- `verify` of it, which reads and decodes every byte: {verify['call']['ratio']:.2f} times the "
            f"first `from_pretrained` of a process, {verify['warm']['ratio']:.2f} times a repeated one;",
            f"- a {memory['checkpoint_bytes'] / 1e9:.2f} GB checkpoint in five shards compresses in "
            f"{memory['compress']['peak_rss_mb']:,} MB of resident memory (importing the package takes "
            f"{memory['import_only']['peak_rss_mb']:,} MB) and decompresses in "
            f"{memory['decompress']['peak_rss_mb']:,} MB.",
        ]
    )


# Table 1; the claim is of the public code's README, with the file in its repository.
_LENET_PUBLISHED = {8048: "0.98", 12420: "0.96", 24840: "0.69"}


def lenet() -> str:
    """The table of LeNet-5, and what is left of it without its smallest weights."""
    rows = sorted(load("lenet")["results"]["coded"], key=lambda row: (row["parametrization"], row["bits"]))
    lines = [
        "## A kilobyte network",
        "",
        "![Test error over bytes of the file](figures/lenet.svg)",
        "",
        "LeNet-5 (Caffe, 431,080 weights) on MNIST; one core does it all. Published: Havasi et al. 2019; "
        "at 8,008 bits what is claimed for a public file of 1,140 bytes.",
        "",
        "| message bits | file, bytes | error %, mean | each seed | published % | steps | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = _LENET_PUBLISHED.get(row["bits"], "") if row["parametrization"] == "mean-kl" else ""
        steps = f"{row['steps']:,}{', of distorted images' if row['distort'] else ''}"
        lines.append(
            f"| {row['message_bits']:,} ({row['parametrization']}) | {row['file_bytes']:,} | "
            f"{row['test_error']:.2f} | {each(row['test_errors'])} | {published} | {steps} | "
            f"{row['minutes']:.0f} |"
        )
    shares = ("20", "30", "40", "50", "60")
    lines += [
        "",
        "Error % where the smallest weights of every tensor are 0:",
        "",
        "| message bits | " + " | ".join(f"{share} %" for share in shares) + " |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{row['pruned'][share]:.2f}" for share in shares)
        lines.append(f"| {row['message_bits']:,} ({row['parametrization']}) | {cells} |")
    return "\n".join([*lines, "", fits()])


def fits() -> str:
    """Steps until a good network within the budget, before coding."""
    found: dict[str, list[str]] = {}
    for fit in load("lenet")["results"]["fits"]:
        if fit["bits"] == 12420:
            rate = f", β moving by {fit['beta_rate']} a step" if fit["parametrization"] == "mean-var" else ""
            reached = fit["steps_to_1.2_percent"]
            cell = f"{reached:,}" if reached else f"never ({fit['kl_bits']:,.0f} bits at the end)"
            found.setdefault(f"{fit['parametrization']} of {fit['steps']:,}{rate}", []).append(cell)
    lines = [f"- {name}: {', '.join(cells)}" for name, cells in sorted(found.items())]
    head = "First of every 2,000 steps of a fit with 1.2 % of validation error within 12,420 bits, per seed:"
    return "\n".join([head, "", *lines])


def fine_tuning() -> str:
    """A hub model fitted within a budget."""
    found, step = load("sst2")["results"], load("variational_step")["results"]
    dense, coded = found["dense"], found["variational"]
    options = coded["options"][0]  # runs before the option had its name called it bits_per_weight
    rate, steps = options.get("rate", options.get("bits_per_weight")), f"{dense['steps']:,.0f}"
    times = ", ".join(
        f"{step[kind]['seconds_ratio']:.2f} and {step[kind]['memory_mb_ratio']:.2f} ({kind})"
        for kind in ("test-channel", "mean-kl", "mean-var")
    )
    return "\n".join(
        [
            "## Fine-tuned within a budget",
            "",
            f"all-MiniLM-L6-v2 with a head on SST-2, {steps} steps each: dense {dense['test']:.1f} %, at a "
            f"rate of {rate} bit per coded weight {coded['test']:.1f} % "
            f"({coded['bits_per_weight_whole_file']:.2f} bits per weight over the whole file of "
            f"{coded['file_bytes']:,.0f} bytes). Per seed: dense {each(dense['tests'])}, coded "
            f"{each(coded['tests'])}.",
            "",
            "A step of training (batch 32 × 64 tokens) takes so many times the time and memory of a plain "
            f"one: {times}.",
        ]
    )


def gpu() -> str:
    """What is known of a GPU as long as nothing is measured."""
    found = load("gpu-floors")["results"]
    problems = found["problems"]
    targets = [p["predicted_met_at_best"] for p in problems if p["target"] is not None]
    return (
        f"## On a GPU\n\nNothing is measured yet. `benchmarks/results/gpu-floors.json` predicts the times of "
        f"{len(problems)} calls of the kernels ({found['chip']['name']}). Of {len(targets)} with a target, "
        f"{sum(targets)} meet it if all units of the GPU overlap perfectly."
    )


def each(percents: list[float]) -> str:
    """The figure of every seed."""
    return ", ".join(f"{percent:.2f}" for percent in percents)


def share(n_bytes: float, dense: str) -> str:
    """Of the dense model's bytes, in percent."""
    return f"{100 * n_bytes / _DENSE_BYTES[dense]:.2g} %"


_MINILM = (
    ("the same, calibrated", "minilm", "calibrated", "1.5"),
    ("on its own words", "minilm", "self", "1"),
)
_SMOLLM2 = (
    ("SmolLM2-135M-Instruct, calibrated", "smollm2", "calibrated", "4"),
    ("the same", "smollm2", "calibrated", "3"),
    ("on its own texts", "smollm2", "self", "3"),
    ("the same, calibrated", "smollm2", "calibrated", "2"),
)


def _calibrated(told: str, name: str, method: str, setting: str, dense: str) -> str:
    row = of_zoo(name, method, setting)
    of = "STS-B" if name == "minilm" else "perplexity"
    quality = row["quality"]["spearman" if name == "minilm" else "perplexity"]
    head = f"| {told} | {row['bytes']:,} | {share(row['bytes'], name)} | {float(setting)} | "
    return f"{head}{of} {quality:.2f} | {dense} |"


def of_zoo(name: str, method: str, setting: str) -> Row:
    """The row of a model, a method and a setting."""
    (found,) = [row for row in known("test") if key(row) == (name, method, setting)]
    return found


def summary() -> str:
    """README's table."""
    results, fitted = load("minilm")["results"], load("sst2")["results"]
    dense = results["dense"]["spearman"]["test"]
    lines = [
        "| model | bytes | of dense | bits per weight | quality | dense |",
        "|---|---|---|---|---|---|",
    ]
    (row,) = [row for row in results["compressed"] if row["asked"] == 2.0]
    lines.append(
        f"| all-MiniLM-L6-v2, not calibrated | {row['bytes']:,} | {share(row['bytes'], 'minilm')} | "
        f"{row['asked']} | STS-B {row['spearman']['test']:.2f} | {dense:.2f} |"
    )
    lines += [_calibrated(*case, f"{dense:.2f}") for case in _MINILM]
    perplexity = of_zoo("smollm2", "dense", "")["quality"]["perplexity"]
    lines += [_calibrated(*case, f"{perplexity:.2f}") for case in _SMOLLM2]
    coded = fitted["variational"]
    lines.append(
        f"| all-MiniLM-L6-v2, fitted to SST-2 | {coded['file_bytes']:,.0f} | "
        f"{share(coded['file_bytes'], 'minilm')} | {coded['bits_per_weight_whole_file']:.1f} | "
        f"accuracy {coded['test']:.1f} % | {fitted['dense']['test']:.1f} % |"
    )
    n_weights = _DENSE_BYTES["lenet"] // 4
    networks = [row for row in load("lenet")["results"]["coded"] if row["parametrization"] == "mean-kl"]
    for row in sorted(networks, key=lambda row: -row["file_bytes"])[::2]:
        n_bytes = row["file_bytes"]
        lines.append(
            f"| LeNet-5 on MNIST, fitted | {n_bytes:,} | {share(n_bytes, 'lenet')} | "
            f"{8 * n_bytes / n_weights:.3f} | error {row['test_error']:.2f} % | |"
        )
    return "\n".join(lines)


def results_page() -> str:
    """docs/results.md."""
    models = (minilm(), stories(), section(), ablation(), self_made(), calibration(), size_rule())
    differences = (deltas(), exact_deltas(), adapters())
    parts = (_HEAD, *models, fine_tuning(), *differences, lenet(), rate_distortion(), speed(), kept(), gpu())
    return "\n\n".join(parts) + "\n"


def renewed(path: Path, table: str) -> str:
    """A document with its table between markers written anew."""
    pattern, text = r"<!-- results -->.*<!-- /results -->", path.read_text(encoding="utf-8")
    return re.sub(pattern, lambda _: f"<!-- results -->\n{table}\n<!-- /results -->", text, flags=re.DOTALL)


def main() -> None:
    """Write the page, its figures, and the tables of other documents."""
    write_figures()
    RESULTS_PAGE.write_text(results_page(), encoding="utf-8")
    README.write_text(renewed(README, summary()), encoding="utf-8")
    CHOOSING.write_text(renewed(CHOOSING, expectations()), encoding="utf-8")


if __name__ == "__main__":
    main()
