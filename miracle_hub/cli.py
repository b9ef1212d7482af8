"""The command line: the verbs of the package, with the same names and defaults."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

import miracle_hub
from miracle_hub.codec.inspection import Inspection, TensorReport
from miracle_hub.codec.report import CALIBRATION_LOGGER, Report, told_by_reason
from miracle_hub.errors import MiracleError
from miracle_hub.options import CompressOptions, DecompressOptions, FitOptions, Options, helps

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A neural network as a small, exact file.",
)

Source = Annotated[str, typer.Argument(help="Folder or Hub id.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Progress = Annotated[bool, typer.Option(help="Show a progress bar.")]
Backend = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or triton.")]
Dense = Annotated[str | None, typer.Option(help="The folder that was compressed, to compare with.")]
Split = Annotated[str | None, typer.Option(help="Of the data, where they have several.")]
Stages = Annotated[int | None, typer.Option(help="Read so many stages only.")]
Base = Annotated[str | None, typer.Option(help="The base of a difference; else the one that SOURCE names.")]
Data = Annotated[str, typer.Option(help="csv, tsv, json, jsonl, parquet, txt; a folder; a Hub id.")]
TextColumns = Annotated[list[str] | None, typer.Option(help="One or two; else those that can be no others.")]
LabelColumn = Annotated[str, typer.Option(help="Of classes: numbers or names.")]


Command = Callable[..., None]


def _command(kind: type[Options]) -> Callable[[Command], Command]:
    """A command of the function's own arguments and the options of a dataclass, which it gets as `options`.

    Of a union of types the command line takes the first, with None if that is one of them; an option that is
    off by default has no --no- form.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in signature(command).parameters.values() if p.name != "options"]
        names = [field.name for field in fields(kind)]

        def run(**given: Any) -> None:
            options = kind(**{name: given.pop(name) for name in names})
            command(**given, options=options)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = Signature([*own, *_parameters(kind)])  # pyright: ignore[reportFunctionMemberAccess]
        app.command()(run)
        return run

    return decorate


def _parameters(kind: type[Options]) -> Iterator[Parameter]:
    hints, texts = get_type_hints(kind), helps(kind)
    for field in fields(kind):
        hint = hints[field.name]
        if isinstance(hint, UnionType) or get_origin(hint) is Union:
            first, *others = get_args(hint)
            hint = first | None if NoneType in others else first
        declared = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
        option = typer.Option(*declared, help=texts[field.name])
        annotation = Annotated[hint, option]
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


@_command(CompressOptions)
def compress(source: Source, out: Out, options: CompressOptions) -> None:
    """Write OUT, a repository that from_pretrained loads, of exactly the size asked for, or lossless."""
    with _told_meanwhile():
        report = miracle_hub.compress(source, out, options=options)
    typer.echo(
        f"{out}: {report.dense_bytes:,} → {report.compressed_bytes:,} bytes "
        f"({report.dense_bytes / report.compressed_bytes:.2f} times smaller), "
        f"{report.bits_per_weight:.4f} bits per weight, {report.seconds:.1f} s "
        f"(backend {report.backend})\n{_told_of_kept(report, source)}"
    )
    for line in () if report.calibration is None else report.calibration_lines:
        typer.echo(_printable(line))
    _tell_files(report)
    if report.base:
        typer.echo(_told_of_base(report))
    typer.echo(f"digest {report.digest}")


def _told_of_kept(report: Report, source: str) -> str:
    if report.lossless:
        return f"lossless: every bit of every tensor is kept; miracle verify --dense {source} compares them"
    return (
        f"{len(report.plain) + len(report.exact)} tensors stay as they are: {report.kept_bytes:,} bytes, "
        f"{report.kept_share:.1%} (weights and others told apart by {report.judged_by})"
    )


def _told_of_base(report: Report) -> str:
    told = f"added to {report.base}: {report.n_same} tensors are the same, {report.n_differing} differ"
    if not report.lossless:
        left_out = len(report.differences_left_out)
        told += f"; of {left_out} of these nothing is stored, which was not worth its bytes"
    return _printable(told)


@_command(DecompressOptions)
def decompress(source: Source, out: Out, options: DecompressOptions) -> None:
    """Write OUT, an ordinary transformers checkpoint, from a compressed repository."""
    n_bytes = miracle_hub.decompress(source, out, options=options)
    typer.echo(f"{out}: {n_bytes:,} bytes")


@_command(FitOptions)
def fit(source: Source, out: Out, data: Data, options: FitOptions) -> None:
    """Fine-tune SOURCE on a data set within a budget of bits, and write OUT, which from_pretrained loads."""
    found = miracle_hub.fit(source, out, data=data, options=options)
    if os.environ.get("RANK", "0") != "0":  # as torchrun numbers processes: one of them speaks
        return
    report = found.report
    asked = "" if report.budget_bytes is None else f" of {report.budget_bytes:,}"
    size = f"{report.compressed_bytes:,}{asked} bytes, {report.bits_per_weight:.4f} bits per weight"
    typer.echo(f"{out}: {size}\nbefore coding {_figures(found.fitted)}; as written {_figures(found.coded)}")
    _tell_files(report)
    if report.base:
        typer.echo(_told_of_base(report))
    typer.echo(f"digest {found.report.digest}")


class _Echo(logging.Handler):
    """Says what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """On standard error."""
        typer.echo(_printable(record.getMessage()), err=True)


@contextmanager
def _told_meanwhile() -> Iterator[None]:
    """What calibration logs while it runs: how long it will take, and how it goes."""
    logger, echo = logging.getLogger(CALIBRATION_LOGGER), _Echo(logging.INFO)
    before = logger.level
    logger.addHandler(echo)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(echo)


def _tell_files(report: Report) -> None:
    """What the output has not, and what it has as it was."""
    kinds = {"copied": report.carried, "left out": report.left_out}
    lines = [f"{kind}, {line}" for kind, said in kinds.items() for line in told_by_reason(said)]
    for line in (*lines, *report.notes):
        typer.echo(_printable(line))


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


@app.command()
def inspect(
    source: Source,
    plots: Annotated[str | None, typer.Option(help="Folder for PNGs.")] = None,
    revision: Revision = None,
    stages: Stages = None,
    base: Base = None,
) -> None:
    """Show every tensor's shape, code, rate, scale and error, and the totals."""
    inspection = miracle_hub.inspect(source, plots=plots, revision=revision, stages=stages, base=base)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(_table(inspection))
    console.print(
        f"{inspection.file_bytes:,} bytes, {inspection.n_weights:,} weights, "
        f"{inspection.bits_per_weight:.4f} bits per weight (whole file), "
        f"{inspection.payload_rate:.4f} (payloads)\ndigest {inspection.digest}"
        + (f"\nadded to {inspection.base}" if inspection.base else "")
        + ("\nlossless: every bit of the source is kept" if inspection.lossless else ""),
        highlight=False,
    )
    for plot in inspection.plots:
        typer.echo(f"no {plot.path.name}: {plot.absent}" if plot.absent else f"{plot.path}")


@app.command()
def verify(
    source: Source,
    dense: Dense = None,
    revision: Revision = None,
    base: Base = None,
    backend: Backend = "auto",
) -> None:
    """Read every byte, decode every tensor and compare all digests; the status is 0 if all agree, else 1."""
    found = miracle_hub.verify(source, dense=dense, revision=revision, base=base, backend=backend)
    for file in found.files:
        said = f"WRONG: {file.defect}" if file.defect else file.found
        typer.echo(_printable(f"{file.name}: {file.n_bytes:,} bytes, sha256 {file.sha256[:16]}…, {said}"))
    if found.defects:
        typer.echo(_printable(f"miracle: {source}: not sound: {found.defects[0]}"), err=True)
        raise typer.Exit(1)
    typer.echo(f"{source}: every byte agrees\ndigest {found.digest}")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="What compress or fit wrote.")],
    repo_id: Annotated[str, typer.Argument(help="user/name")],
    private: Annotated[bool, typer.Option("--private", help="Refuse a public repository.")] = False,
    base: Annotated[str | None, typer.Option(help="Hub id of the dense model, for the card.")] = None,
    dense: Dense = None,
    facts: Annotated[str | None, typer.Option(help="JSON of measured facts for the card.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; it is made if it is new.")] = None,
    token: Annotated[str | None, typer.Option(help="By default that of hf auth login.")] = None,
) -> None:
    """Verify a compressed folder, write its card, upload it, and compare what the Hub then holds."""
    done = miracle_hub.push(
        folder, repo_id, private=private, base=base, dense=dense, facts=facts, revision=revision, token=token
    )
    typer.echo(f"{done.url}\n{done.n_files} files, {done.n_bytes:,} bytes, as verified\ndigest {done.digest}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    b: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    data: Annotated[str, typer.Option(help="Texts, images, or an npz of inputs.")],
    split: Split = None,
    text_columns: TextColumns = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.")] = 128,
    revision_a: Revision = None,
    revision_b: Revision = None,
    progress: Progress = True,
) -> None:
    """Compare what two models, dense or compressed, answer to the same texts, images or arrays."""
    found = miracle_hub.compare(
        a, b, data=data, split=split, text_columns=text_columns, max_length=max_length,
        revision_a=revision_a, revision_b=revision_b, progress=progress,
    )  # fmt: skip
    typer.echo(f"A {a}: {found.bytes_a:,} bytes\nB {b}: {found.bytes_b:,} bytes\n{found.statement}")


class _Certify(TyperCommand):
    """Exactly one of two flags, which the parser would take one after the other, or ask for by one name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [flag for flag in ("--fitted", "--held-out") if flag in args]
        if len(given) != 1 and "--help" not in args and not ctx.resilient_parsing:
            ctx.fail(
                "certify: expected either --fitted (SOURCE was fitted to these rows, or made or chosen with "
                f"a view to them) or --held-out (it was not), found {' and '.join(given) or 'neither'}; give "
                "one of them"
            )
        return super().parse_args(ctx, args)


@app.command(cls=_Certify)
def certify(
    source: Source,
    data: Data,
    fitted: Annotated[
        bool,
        typer.Option(
            "--fitted/--held-out",
            help="Whether SOURCE was fitted to these rows, or made or chosen with a view to them.",
        ),
    ],
    split: Split = None,
    delta: Annotated[float, typer.Option(help="Chance that the bound is wrong.")] = 0.05,
    text_columns: TextColumns = None,
    label_column: LabelColumn = "label",
    training: Annotated[
        str | None, typer.Option(help="What SOURCE was fitted to; its rows are no news.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a text, or of a window.")] = 128,
    revision: Revision = None,
    progress: Progress = True,
) -> None:
    """Bound the error of a text classifier, or the nats per token of a language model, from DATA and size."""
    certificate = miracle_hub.certify(
        source, data=data, fitted=fitted, split=split, delta=delta, text_columns=text_columns,
        label_column=label_column, training=training, max_length=max_length, revision=revision,
        progress=progress,
    )  # fmt: skip
    typer.echo(
        f"{source}: {certificate.n_bytes:,} bytes, sha256 {certificate.sha256}\n{certificate.statement}"
    )


def _table(inspection: Inspection) -> Table:
    table = Table(box=None, header_style="bold")
    for title in ("tensor", "shape", "dtype", "code (L, k, V)", "rotation", "scale"):
        table.add_column(title, overflow="fold")
    for title in ("bits/weight", "relative error"):
        table.add_column(title, justify="right")
    for tensor in inspection.tensors:
        table.add_row(*_row(tensor))
    return table


def _row(tensor: TensorReport) -> tuple[str, ...]:
    name, shape = escape(_printable(tensor.name)), " × ".join(map(str, tensor.shape)) or "scalar"
    rate = f"{tensor.rate:.3f}"
    if tensor.reason:
        return name, shape, tensor.dtype, f"{tensor.codec or 'plain'}: {tensor.reason}", "", "", rate, ""
    codes = " + ".join(dict.fromkeys(f"{c.window_bits},{c.step_bits},{c.step_weights}" for c in tensor.codes))
    scale = f"{tensor.scale:.3g} per {'row' if tensor.row_scales else 'tensor'}"
    rotation = str(tensor.rotation) if tensor.rotation > 1 else "none"
    error = f"{tensor.relative_error:.5f}"
    return name, shape, tensor.dtype, codes, rotation, scale, rate, error


def _printable(text: str) -> str:
    """Without what would command the terminal: names are a stranger's."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def main() -> None:
    """Run the command line; errors of the package end it with one line and status 1."""
    try:
        app()
    except MiracleError as error:
        typer.echo(f"miracle: {_printable(str(error))}", err=True)
        sys.exit(1)
