"""Verbs of the package; the command line has the same names and defaults.

What only writes, or draws, is imported by the verbs that do: whoever loads a file imports none of it.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from miracle_hub.calibrate.asked import is_asked, is_self
from miracle_hub.code import DEFAULT_WIDTH
from miracle_hub.codec.decompress import decompress_folder
from miracle_hub.codec.decompress import load_state_dict as load_folder
from miracle_hub.codec.detector import TO_COMPRESS, TO_DECODE, TO_INSPECT
from miracle_hub.codec.inspection import Inspection, inspect_folder
from miracle_hub.codec.report import Report
from miracle_hub.codec.source import is_adapter
from miracle_hub.codec.verification import Verification
from miracle_hub.errors import OptionError
from miracle_hub.hub.resolve import local_folder, not_downloaded
from miracle_hub.options import (
    DEFAULT_SHARD_SIZE,
    DEFAULT_WINDOW_BITS,
    CompressOptions,
    DecompressOptions,
    LoadOptions,
    chosen,
)


def compress(
    source: str | Path,
    out: str | Path,
    *,
    bits_per_weight: float | None = None,
    size: str | int | None = None,
    exact: bool = False,
    window_bits: int = DEFAULT_WINDOW_BITS,
    rotation: int = DEFAULT_WIDTH,
    seed: int = 0,
    modules_to_not_convert: list[str] | str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    stages: int = 1,
    base: str | Path | None = None,
    base_revision: str | None = None,
    calibrate: str | Any | None = "self",
    effort: int = 1,
    work: str | Path | None = None,
    backend: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    model: nn.Module | None = None,
    options: CompressOptions | None = None,
) -> Report:
    """Write `out`, a repository that `from_pretrained` loads, of exactly the size asked for, or lossless.

    Args:
        source: a folder written by `save_pretrained`, of a model or of an adapter of PEFT, or a Hub id.
        out: the folder to write; it appears whole or not at all.
        bits_per_weight: bits of the whole files, headers and plain tensors included, over all weights.
        size: the same as bytes, such as "5.5MB"; never exceeded.
        exact: lossless instead: every bit of every tensor is kept, and the size is what that takes.
        window_bits: window of the code, 8 to 16; each further bit doubles the time and lowers the squared
            error a little.
        rotation: widest Hadamard rotation, a power of two; every tensor gets the widest up to it that divides
            its rows; 1 is none.
        seed: of the shared candidates; part of the file.
        modules_to_not_convert: modules or tensors that stay plain, by name or end of name after a dot; or, in
            Python, a regular expression that matches whole names.
        max_shard_size: of one output file.
        stages: files of their own, 1 to 9, that can be loaded one after the other; each but the first halves
            the squared error for 4/7 bits per weight. The size is that of all together.
        base: folder or Hub id of the model that the source was fine-tuned from: only the difference to it is
            stored.
        base_revision: branch, tag or commit of the base, a Hub id.
        calibrate: what the model is run on, without labels: "self" (inputs of its own making), "none" (it is
            not run), a file or folder, a Hub id; or, in Python, texts, a data set or arrays.
        effort: of calibration, 0 to 5: each takes 4 times as long as the one before, or more.
        work: a folder where a calibration keeps what took long: if it is killed, the same call goes on there.
            It is emptied at the end.
        backend: "auto" (a GPU where there is one), "cpu" (numba) or "triton" (a GPU).
        revision: branch, tag or commit of a Hub id.
        overwrite: replace the output if it exists.
        progress: show a progress bar.
        model: the source's, where transformers has no class for it: a module whose parameters have the names
            of the source's tensors. It stays as it is.
        options: all of these from `bits_per_weight` on, `model` apart, instead of the keywords.

    By default the model is run, if it can be; if not, a warning says so, and the file is as with
    `calibrate=None`. Where data or a model are given, what they do not fit is an error.

    Raises:
        SourceError: and its subclasses: the source cannot be read, is no dense model or holds NaN.
        BaseModelError: the base cannot be read, or is a difference itself.
        CalibrationError: the model does not run on what was given.
        DataError: the data cannot be read, are none that the model takes, or too few.
        BudgetError: the size cannot be met; the message says the least or most possible.
        OptionError: an option is out of range; or there is none of bits_per_weight, size and exact, or more.
        ResumeError: `work` is of a run with another source, other data or options.
        BackendError: the backend cannot run here.
        OutputExistsError: `out` exists. OutputWriteError: it cannot be written.
    """
    options = chosen(CompressOptions, options, locals())
    options.require_budget()  # before a Hub source is downloaded
    folder = local_folder(source, options.revision, taken=TO_COMPRESS)
    if is_adapter(folder):
        return _compress_adapter(source, folder, Path(out), options, model)
    return _compress_model(source, folder, Path(out), options, model)


def _compress_model(
    source: str | Path, folder: Path, out: Path, options: CompressOptions, model: nn.Module | None
) -> Report:
    from miracle_hub.codec.compress import compress_folder
    from miracle_hub.hub.card import write_card
    from miracle_hub.plugin.roles import roles_of

    based_on = _base_folder(options.base, options.base_revision)
    plainly = partial(compress_folder, folder, roles=roles_of, base=based_on)
    about_output: dict[str, Any] = {
        "card": lambda target, report: write_card(target, report, folder, _hub_id(source), based_on),
        "not_downloaded": not_downloaded(source, options.revision, folder),
    }
    if options.exact or not is_asked(options.calibrate):
        _refuse_idle(model, options.work)
        return plainly(out, options, **about_output)
    from miracle_hub.calibrate.compression import compress_calibrated

    return compress_calibrated(plainly, folder, out, options, model=model, base=based_on, **about_output)


def _compress_adapter(
    source: str | Path, folder: Path, out: Path, options: CompressOptions, model: nn.Module | None
) -> Report:
    """
    Raises:
        OptionError: a model is to be run.
    """
    from miracle_hub.codec.adapter import compress_adapter
    from miracle_hub.hub.card import write_card

    if is_asked(options.calibrate) and not is_self(options.calibrate):
        raise OptionError(
            f"calibrate: expected none for an adapter, which is coded without its model, found "
            f"{str(options.calibrate)[:80]!r}; leave it out"
        )
    _refuse_idle(model, options.work)
    return compress_adapter(
        folder, out, options,
        card=lambda target, report: write_card(target, report, folder, _hub_id(source)),
        not_downloaded=not_downloaded(source, options.revision, folder),
    )  # fmt: skip


def _base_folder(base: str | Path | None, revision: str | None = None) -> Path | None:
    """The local folder of a base that a user gives."""
    return None if base is None else local_folder(base, revision, taken=TO_DECODE)


def _hub_id(source: str | Path) -> str | None:
    return None if Path(source).exists() else str(source)


def _refuse_idle(model: nn.Module | None, work: str | Path | None) -> None:
    """
    Raises:
        OptionError: a model is given that would not be run, or a folder that nothing would be kept in.
    """
    if work is not None:
        raise OptionError(
            "work: expected none, since without calibration nothing is kept, found one; give calibrate, or "
            "leave it out"
        )
    if model is not None:
        raise OptionError(
            "model: expected none, since without calibration no model is run, found one; give calibrate, or "
            "leave it out"
        )


def decompress(
    source: str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    stages: int | None = None,
    base: str | Path | None = None,
    backend: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    options: DecompressOptions | None = None,
) -> int:
    """Write `out`, an ordinary transformers checkpoint, from a compressed one; returns its bytes.

    Args:
        source: a compressed folder, or a Hub id.
        out: the folder to write; it appears whole or not at all.
        max_shard_size: of one output file.
        stages: read so many stages only; by default all.
        base: folder or Hub id of the base, of a repository that is a difference to one; by default the one it
            names.
        backend: "auto" (a GPU where there is one), "cpu" (numba) or "triton" (a GPU).
        revision: branch, tag or commit of a Hub id.
        overwrite: replace the output if it exists.
        progress: show a progress bar.
        options: all of these from `max_shard_size` on, instead of the keywords.

    Raises:
        SourceKindError: the source is another kind of model.
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
        OptionError: an option is out of range.
        OutputExistsError: `out` exists. OutputWriteError: it cannot be written.
    """
    options = chosen(DecompressOptions, options, locals())
    folder, base_folder = local_folder(source, options.revision, options.stages), _base_folder(options.base)
    return decompress_folder(folder, Path(out), options, base_folder)


def load_state_dict(
    source: str | Path,
    *,
    revision: str | None = None,
    stages: int | None = None,
    base: str | Path | None = None,
    verify: bool = True,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """All tensors of a compressed folder, file or Hub repository, dense; imports no transformers.

    Args:
        source: a compressed folder or file, or a Hub id.
        revision: branch, tag or commit of a Hub id.
        stages: read so many stages only; by default all.
        base: folder or Hub id of the base, of a repository that is a difference to one; by default the one it
            names.
        verify: compare the digests in the file with those of what was decoded.
        backend: who decodes: "cpu", "triton", or "auto" for a GPU where there is one.

    Raises:
        SourceKindError: the source is another kind of model.
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
        OptionError: an option is out of range.
    """
    options = LoadOptions(stages=stages, verify=verify, backend=backend)
    folder = local_folder(source, revision, options.stages)
    given = {"verify": options.verify, "backend": options.backend, "stages": options.stages}
    return load_folder(folder, base=_base_folder(base), **given)


def inspect(
    source: str | Path,
    *,
    plots: str | Path | None = None,
    revision: str | None = None,
    stages: int | None = None,
    base: str | Path | None = None,
) -> Inspection:
    """What a compressed repository holds: per tensor the code, rate, scale and error, and totals.

    Args:
        plots: a folder for PNGs: bits and squared error per tensor, rate and distortion, and KL per group of
            blocks where a fit's coding.json lies in `source` or in "<source>-fit".
        base: folder or Hub id of the base, of a repository that is a difference to one; by default the one it
            names.

    Raises:
        SourceKindError: the source is not compressed.
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
        OutputWriteError: a plot cannot be written.
    """
    from miracle_hub.hub.plots import read_journal, write_plots

    folder = local_folder(source, revision, stages, taken=TO_INSPECT)
    inspection = inspect_folder(folder, stages, _base_folder(base))
    if plots is None:
        return inspection
    return replace(inspection, plots=write_plots(inspection, read_journal(folder), Path(plots)))


def verify(
    source: str | Path,
    *,
    dense: str | Path | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    backend: str = "auto",
) -> Verification:
    """Read every byte of a compressed folder, file or Hub repository, decode all, and compare all digests.

    Args:
        dense: the folder that was compressed: plain tensors must be its bits, and coded ones have the
            squared error that the files promise.
        revision: branch, tag or commit of a Hub source.
        base: folder or Hub id of the base, of a repository that is a difference to one; by default the one it
            names.
        backend: who decodes.

    Returns:
        A report of every file; `require()` raises an error if there is a defect.

    Raises:
        SourceError: there is no such source. SourceKindError: it is not compressed.
        BackendError: the backend cannot run here.
    """
    from miracle_hub.hub.card import verify_with_card

    folder = local_folder(source, revision, taken=TO_INSPECT if dense is None else TO_DECODE)
    return verify_with_card(folder, None if dense is None else Path(dense), backend, _base_folder(base))
