"""What the verbs are told: every option once, with its type, default, help and check.

The text behind a field's type is its help. The command line makes its options of these fields, where a union
of types is the first of them; the verbs have the same names and defaults in their signatures and the same
texts in their docstrings, which a test compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_type_hints

from miracle_hub.checks import (
    check_choice,
    check_data,
    check_integer,
    check_lossless,
    check_one_budget,
    check_path,
    check_positive,
)
from miracle_hub.code import BACKENDS, DEFAULT_WIDTH, MAX_STAGES, MAX_WIDTH_LOG2
from miracle_hub.errors import OptionError
from miracle_hub.names import check_names
from miracle_hub.sizes import check_budget, check_rate, parse_size

# On two cores 1.3 M weights/s at 2 bits and 3.5 % more squared error than windows of 16 bits, which take four
# times as long or more (benchmarks/throughput.py, rate_distortion.py).
DEFAULT_WINDOW_BITS = 14
WINDOW_BITS = (8, 16)
DEFAULT_SHARD_SIZE = "5GB"
TASKS = ("text-classification", "causal-lm")
_WINDOW_HINT = f"longer windows are slower and lose a little less, {DEFAULT_WINDOW_BITS} suits most models"
_STAGES_HINT = "1 suits who loads all at once, 3 who downloads over slow lines; each is a file more"
_ALL = "leave it out for all"

BitsPerWeight = Annotated[
    float | None, "Bits of the whole files, headers and plain tensors included, over all weights."
]
Size = Annotated[str | int | None, 'The same as bytes, such as "5.5MB"; never exceeded.']
ShardSize = Annotated[str | int, "Of one output file."]
Seed = Annotated[int, "Of the shared candidates; part of the file."]
Backend = Annotated[str, '"auto" (a GPU where there is one), "cpu" (numba) or "triton" (a GPU).']
Stages = Annotated[int | None, "Read so many stages only; by default all."]
Revision = Annotated[str | None, "Branch, tag or commit of a Hub id."]
Base = Annotated[
    str | Path | None,
    "Folder or Hub id of the base, of a repository that is a difference to one; by default the one it names.",
]
Overwrite = Annotated[bool, "Replace the output if it exists."]
Progress = Annotated[bool, "Show a progress bar."]
Calibrate = Annotated[
    str | Any | None,
    'What the model is run on, without labels: "self" (inputs of its own making), "none" (it is not run), a '
    "file or folder, a Hub id; or, in Python, texts, a data set or arrays.",
]
Work = Annotated[
    str | Path | None,
    "A folder where a calibration keeps what took long: if it is killed, the same call goes on there. It is "
    "emptied at the end.",
]
Effort = Annotated[int, "Of calibration, 0 to 5: each takes 4 times as long as the one before, or more."]


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """How `compress` writes a repository, and how large.

    Raises:
        OptionError, BudgetError: an option is out of range, or there are two budgets.
    """

    bits_per_weight: BitsPerWeight = None
    size: Size = None
    exact: Annotated[
        bool, "Lossless instead: every bit of every tensor is kept, and the size is what that takes."
    ] = False
    window_bits: Annotated[
        int,
        "Window of the code, 8 to 16; each further bit doubles the time and lowers the squared error a "
        "little.",
    ] = DEFAULT_WINDOW_BITS
    rotation: Annotated[
        int,
        "Widest Hadamard rotation, a power of two; every tensor gets the widest up to it that divides its "
        "rows; 1 is none.",
    ] = DEFAULT_WIDTH
    seed: Seed = 0
    modules_to_not_convert: Annotated[
        list[str] | str | None,
        "Modules or tensors that stay plain, by name or end of name after a dot; or, in Python, a regular "
        "expression that matches whole names.",
    ] = None
    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE
    stages: Annotated[
        int,
        "Files of their own, 1 to 9, that can be loaded one after the other; each but the first halves the "
        "squared error for 4/7 bits per weight. The size is that of all together.",
    ] = 1
    base: Annotated[
        str | Path | None,
        "Folder or Hub id of the model that the source was fine-tuned from: only the difference to it is "
        "stored.",
    ] = None
    base_revision: Annotated[str | None, "Branch, tag or commit of the base, a Hub id."] = None
    calibrate: Calibrate = "self"
    effort: Effort = 1
    work: Work = None
    backend: Backend = "auto"
    revision: Revision = None
    overwrite: Overwrite = False
    progress: Progress = True

    def __post_init__(self) -> None:
        if self.bits_per_weight is not None and self.size is not None:
            raise OptionError("expected either bits_per_weight or size, found both; give one of them")
        check_budget(self.bits_per_weight, self.size)
        if self.exact:
            check_lossless({f.name: (getattr(self, f.name), f.default) for f in fields(self)})
        check_integer("window_bits", self.window_bits, *WINDOW_BITS, hint=_WINDOW_HINT)
        if self.rotation not in (1 << i for i in range(MAX_WIDTH_LOG2 + 1)):
            raise OptionError(
                f"rotation: expected a power of two up to {1 << MAX_WIDTH_LOG2}, found {self.rotation}; "
                f"{DEFAULT_WIDTH} suits most models, 1 is none"
            )
        check_integer("seed", self.seed, 0, 2**64 - 1)
        check_integer("stages", self.stages, 1, MAX_STAGES, hint=_STAGES_HINT)
        check_data("calibrate", self.calibrate)
        check_integer("effort", self.effort, 0, 5)
        check_path("work", self.work)
        check_path("base", self.base)
        check_names(self.modules_to_not_convert, "modules_to_not_convert")
        parse_size(self.max_shard_size, "max_shard_size")
        check_choice("backend", self.backend, BACKENDS)

    @property
    def has_budget(self) -> bool:
        """Whether a size of the whole files is asked for."""
        return self.bits_per_weight is not None or self.size is not None

    def require_budget(self) -> None:
        """What only files that training has coded can do without.

        Raises:
            OptionError: there is no size.
        """
        if not self.has_budget and not self.exact:
            raise OptionError(
                "expected either bits_per_weight or size, found neither; give one of them, or exact"
            )


@dataclass(frozen=True, kw_only=True)
class DecompressOptions:
    """How `decompress` writes an ordinary checkpoint.

    Raises:
        OptionError: an option is out of range.
    """

    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE
    stages: Stages = None
    base: Base = None
    backend: Backend = "auto"
    revision: Revision = None
    overwrite: Overwrite = False
    progress: Progress = True

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size, "max_shard_size")
        check_integer("stages", 1 if self.stages is None else self.stages, 1, MAX_STAGES, hint=_ALL)
        check_choice("backend", self.backend, BACKENDS)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How `fit` fine-tunes and codes a model; one of `bits_per_weight`, `size` and `rate` is its budget.

    Raises:
        OptionError, BudgetError: an option is out of range, or there is not exactly one budget.
    """

    task: Annotated[str, '"text-classification" or "causal-lm".'] = TASKS[0]
    bits_per_weight: BitsPerWeight = None
    size: Size = None
    rate: Annotated[
        float | None, "Bits per coded value instead; headers, scales and plain tensors come on top."
    ] = None
    delta: Annotated[
        bool,
        "OUT is a difference to SOURCE, which its readers need too: only what the fit changes is coded; what "
        "is not coded, and SOURCE has, stays as it is.",
    ] = False
    target_modules: Annotated[
        str | list[str] | None,
        'What is coded: "all-matrices" (by default), "all-linear" (that of a difference), "all", a regular '
        "expression that matches whole names of modules or parameters; or, in Python, a list of names or "
        "ends of names.",
    ] = None
    parametrization: Annotated[
        str | None,
        '"test-channel" (no noise in the fit; by default), "mean-kl" (for far less than 1 bit; that of a '
        'difference) or "mean-var".',
    ] = None
    text_columns: Annotated[
        list[str] | None, "One or two columns of text; by default those that can be no others."
    ] = None
    label_column: Annotated[str, "Of a classification: whole numbers from 0 on, or names of classes."] = (
        "label"
    )
    epochs: Annotated[float, "Passes over the data."] = 1.0
    steps: Annotated[int, "Of the optimizer; above 0 they count instead of epochs."] = -1
    batch_size: Annotated[int, "Rows of a step, in every process."] = 32
    learning_rate: Annotated[float, "That of a dense fine-tuning; refits have their own."] = 1e-4
    max_length: Annotated[int, "Tokens of a text, or of a language model's window."] = 128
    groups: Annotated[int, "Groups that are coded one after the other."] = 40
    refit_steps: Annotated[int, "Steps of the optimizer after every group."] = 10
    distill: Annotated[bool, "Refits hold the model to what the fit made of it, instead of to labels."] = True
    seed: Annotated[int, "Of the data's order, a new head, the noise and the shared candidates."] = 0
    resume: Annotated[bool, "Go on where an interrupted fit of the same arguments was."] = False
    overwrite: Overwrite = False
    progress: Progress = True

    def __post_init__(self) -> None:
        check_one_budget("fit", bits_per_weight=self.bits_per_weight, size=self.size, rate=self.rate)
        check_budget(self.bits_per_weight, self.size)
        check_rate(self.rate)
        check_choice("task", self.task, TASKS)
        check_names(self.target_modules, "target_modules")
        for name in ("batch_size", "max_length", "groups"):
            check_integer(name, getattr(self, name), 1)
        check_integer("refit_steps", self.refit_steps, 0)
        check_integer("steps", self.steps, -1)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        for name in ("epochs", "learning_rate"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How compressed files are read: what a reader chooses, not what a repository is.

    Raises:
        OptionError: an option is none.
    """

    stages: Stages = None
    verify: Annotated[bool, "Compare the digests in the file with those of what was decoded."] = True
    backend: Annotated[str, 'Who decodes: "cpu", "triton", or "auto" for a GPU where there is one.'] = "auto"
    keep_compressed: Annotated[
        bool,
        "Linear layers keep their payloads and decode them in each forward pass, instead of once on load.",
    ] = False
    modules_to_not_convert: Annotated[
        list[str] | str | None,
        "Modules to load dense though layers stay compressed, by name or end of name after a dot; or a "
        "regular expression that matches whole names.",
    ] = None

    def __post_init__(self) -> None:
        check_integer("stages", 1 if self.stages is None else self.stages, 1, MAX_STAGES, hint=_ALL)
        for name in ("verify", "keep_compressed"):
            if not isinstance(value := getattr(self, name), bool):
                raise OptionError(f"{name}: expected True or False, found {value!r}; leave it out")
        check_choice("backend", self.backend, BACKENDS)
        check_names(self.modules_to_not_convert, "modules_to_not_convert")


class Options(Protocol):
    """A dataclass of options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def helps(kind: type[Options]) -> dict[str, str]:
    """The help of every option, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in fields(kind)}


OptionsT = TypeVar("OptionsT", bound=Options)


def chosen(kind: type[OptionsT], options: OptionsT | None, given: Mapping[str, Any]) -> OptionsT:
    """The options of a verb that takes them together or as keywords.

    Args:
        options: all together, or None.
        given: the verb's arguments by name, options and others; locals() at its beginning.

    Raises:
        OptionError: both are given, or an option is out of range.
    """
    if options is None:
        return kind(**{field.name: given[field.name] for field in fields(kind)})
    for field in fields(kind):
        value = given[field.name]  # which may be an array, that compares to an array
        if type(value) is not type(field.default) or value != field.default:
            raise OptionError(
                f"options: expected either options or keywords, found options and {field.name}; give all of "
                f"them in {kind.__name__}, or none"
            )
    return options
