"""What a variational fine-tuning is told: the budget, what is coded, and how."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

from miracle_hub.checks import check_choice, check_integer, check_one_budget, check_path, check_positive
from miracle_hub.code import MAX_STEP_WEIGHTS, MAX_WINDOW_BITS, Code
from miracle_hub.coding.sharing import KINDS
from miracle_hub.errors import BudgetError, OptionError
from miracle_hub.names import check_names
from miracle_hub.sizes import check_budget, check_rate
from miracle_hub.training.blocks import MAX_BLOCK_WEIGHTS

PARAMETRIZATIONS = ("mean-kl", "mean-var", "test-channel")
STREAMS = ("tensor", "network")
# At 0.03 bits per weight (LeNet-5) the fit must know the noise. At 1 bit (MiniLM on SST-2, 1,790 steps) noise
# cost 7.6 points of accuracy; the test channel with distillation 2.7 of 3,000 steps (benchmarks/sst2.py).
_DEFAULT_PARAMETRIZATIONS = {"tensor": "test-channel", "network": "mean-kl"}
# Of differences to a base, of which a file has a tenth of a bit per weight: scales of rows of 384 weights
# would be 0.04 of it.
_DEFAULTS_OF_DIFFERENCES = {"parametrization": "mean-kl", "scales": "tensor", "target_modules": "all-linear"}
SCALES = ("row", "tensor")
CODES = ("sliding", "block")
SELECTIONS = ("best", "sample")
# Rates are fractions k/V with k of this at most, because windows of L bits remember L/k steps.
_MAX_STEP_BITS = 4
# What options were called before.
_OLD_NAMES = {"bits": "message_bits"}


@dataclass(frozen=True)
class VariationalConfig:
    """Options of `make_variational`; exactly one of the first four is the budget.

    Attributes:
        rate: message bits per value that is coded, the mean over all of them (of a sliding code, the rate of
            a long message).
        message_bits: of a whole network, if `streams` is "network"; of a rate or of these, too, 99 % are used
            at least, or what is used is logged.
        bits_per_weight: bits of the whole file that the model will become, headers, scales and plain tensors
            included, over all its weights.
        size: the same as bytes, such as "5.5MB". `miracle_hub.make_variational` plans the file for either: it
            has at least 99 % of it, and never more.
        target_modules: "all", "all-matrices", "all-linear", a regular expression that must match whole names
            of modules or parameters, or a list of names or ends of names. None means "all" for a network's
            stream, "all-matrices" for streams of tensors, and "all-linear" with a base.
        exclude_modules: a regular expression or a list, of modules that stay as they are.
        modules_to_save: a regular expression or a list, of modules that stay as they are, are trained, and
            are stored as they are.
        parametrization: "mean-kl" (Gaussians that are drawn in every step; the KL of every block is fixed by
            construction), "mean-var" (the same, with a KL that is annealed, as published) or "test-channel",
            which is no variational inference: weights are fitted without noise, and each group becomes
            Gaussians when it is coded, whose KL is the rate in the mean. None means "mean-kl" for a network's
            stream and with a base, else "test-channel", which suits 1 bit per weight and more.
        streams: "tensor", one message per tensor, for hub models; "network", one for all, for small networks.
        scales: of the prior: "row" (one for every row of at least 128 weights, else one per tensor) or
            "tensor"; a network's stream has one per tensor. None means "row", and "tensor" with a base.
        base: folder or Hub id of a model that has weights of the same names: they are the means of priors, so
            that differences to them are coded. What it lacks, as a new head, is trained and stored as it is;
            what is not coded and equal to the base's is frozen, and not stored.
        code: "sliding" (a trellis of overlapping windows) or "block" (MIRACLE as published).
        window_bits: L, also the bits of a block of the block code.
        kl_block_weights: weights that share a KL budget; for the block code it is its own V.
        sharing: factors by which weights share values, by (end of) parameter name; for a network's stream.
        sharing_kind: "hash" or "tile".
        selection: "best" or "sample".
        seed: of candidates, permutation, hash and noise.
        beta: first weight of the KL, and `beta_rate` its relative change per step (Mean-Var).

    Raises:
        OptionError, BudgetError: an option is none.
    """

    rate: float | None = None
    message_bits: int | None = None
    bits_per_weight: float | None = None
    size: str | int | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    parametrization: str | None = None
    streams: str = "tensor"
    scales: str | None = None
    base: str | Path | None = None
    code: str = "sliding"
    window_bits: int = 14
    kl_block_weights: int = 128
    sharing: dict[str, float] = field(default_factory=dict)
    sharing_kind: str = "hash"
    selection: str = "best"
    seed: int = 0
    beta: float = 1e-8
    beta_rate: float = 5e-5

    def __post_init__(self) -> None:
        check_path("base", self.base)
        self._fill_in()
        for name, choices in (
            ("streams", STREAMS),
            ("parametrization", PARAMETRIZATIONS),
            ("scales", SCALES),
            ("code", CODES),
            ("selection", SELECTIONS),
            ("sharing_kind", KINDS[1:]),
        ):
            check_choice(name, getattr(self, name), choices)
        self._check_budget()
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            check_names(getattr(self, name), name)
        hint = "64 to 256 are good values"
        check_integer("kl_block_weights", self.kl_block_weights, 1, MAX_BLOCK_WEIGHTS, hint=hint)
        self._check_sharing()
        check_positive("beta", self.beta)
        check_positive("beta_rate", self.beta_rate)

    def _fill_in(self) -> None:
        """What is not given depends on what else is; a base is its path as text, as JSON has it.

        Raises:
            OptionError: a network's file cannot state a base.
        """
        defaults = {"parametrization": _DEFAULT_PARAMETRIZATIONS.get(self.streams), "scales": "row"}
        if self.base is not None:
            object.__setattr__(self, "base", str(self.base))
            defaults = _DEFAULTS_OF_DIFFERENCES
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.base is not None and self.streams != "tensor":
            raise OptionError(
                "base: expected streams='tensor', whose repository states the base, found "
                f"{self.streams!r}; leave out one of them"
            )

    def _check_sharing(self) -> None:
        for name, factor in self.sharing.items():
            if not isinstance(factor, int | float) or not factor >= 1:
                raise OptionError(
                    f"sharing: expected a factor of 1 or more for {name!r}, found {factor!r}; leave out what "
                    "is not shared"
                )
        if self.sharing and self.streams != "network":
            raise OptionError(
                "sharing: expected streams='network', found 'tensor', whose files cannot say which weights "
                "share a value; pass it, or do not share"
            )

    def _check_budget(self) -> None:
        check_one_budget(
            "budget", bits_per_weight=self.bits_per_weight, size=self.size, rate=self.rate,
            message_bits=self.message_bits,
        )  # fmt: skip
        check_budget(self.bits_per_weight, self.size)
        if self.message_bits is not None and self.streams != "network":
            raise BudgetError(
                f"message_bits: expected streams='network', whose message they are of, found "
                f"{self.streams!r}; pass it, or give rate"
            )
        if not isinstance(self.window_bits, int) or not 1 <= self.window_bits <= MAX_WINDOW_BITS:
            raise BudgetError(
                f"window_bits: expected 1 to {MAX_WINDOW_BITS} bits per block or window, found "
                f"{self.window_bits!r}; choose another value (12 to 20 are usual)"
            )
        bits = 1 if self.message_bits is None else self.message_bits
        if not isinstance(bits, int) or bits < 1:
            raise BudgetError(f"message_bits: expected a positive whole number, found {bits!r}; pass more")
        check_rate(self.rate)

    @property
    def is_of_files(self) -> bool:
        """Whether the budget is that of the whole file, which only the whole model can be measured by."""
        return self.bits_per_weight is not None or self.size is not None

    def codes(self) -> Iterator[Code]:
        """Every code that a stream may get, from the highest rate on."""
        if self.code == "block":
            steps = range(1, MAX_STEP_WEIGHTS + 1)
            yield from (Code(self.window_bits, self.window_bits, n, self.seed) for n in steps)
        for rate in _sliding_rates(self.window_bits) if self.code == "sliding" else ():
            yield Code(self.window_bits, rate.numerator, rate.denominator, self.seed)

    def code_for(self, n_values: int, where: str) -> Code:
        """The code of a stream. Its message never exceeds `message_bits`, nor its rate `rate`; to that the
        first window of a sliding code adds its L - k bits.

        Raises:
            BudgetError: the budget allows no message, or is that of a whole file.
        """
        if self.is_of_files:
            raise BudgetError(
                f"{where}: expected rate or message_bits, found the budget of a whole file; call "
                "miracle_hub.make_variational, which measures the model by it"
            )
        budget = int((self.rate or 0) * n_values) if self.message_bits is None else self.message_bits
        if budget > MAX_WINDOW_BITS * n_values:
            raise BudgetError(
                f"{where}: {budget} bits for {n_values} values are more than {MAX_WINDOW_BITS} bits for "
                "each; lower the budget"
            )
        if self.code == "block":
            code = _block_code(n_values, budget, self.window_bits, self.seed)
        else:
            code = _sliding_code(n_values, self.message_bits, self.rate, self.window_bits, self.seed)
        if code is None:
            raise BudgetError(
                f"{where}: {budget} bits for {n_values} values are less than a {self.code} code with windows "
                f"of {self.window_bits} bits and at most {MAX_STEP_WEIGHTS} values per step can use; raise "
                "the budget, share weights, or choose shorter windows"
            )
        return code


def refuse_old_names(options: Iterable[str], where: str) -> None:
    """Name what an option is called now.

    Raises:
        OptionError: one of the names is not in use any more.
    """
    for name in options:
        if name in _OLD_NAMES:
            raise OptionError(f"{where}: {name} is now {_OLD_NAMES[name]}; write {_OLD_NAMES[name]}=…")


def _block_code(n_values: int, budget: int, window_bits: int, seed: int) -> Code | None:
    """Blocks of equal size, as many as the budget pays for."""
    n_blocks = budget // window_bits
    if not n_blocks or (step_weights := -(-n_values // n_blocks)) > MAX_STEP_WEIGHTS:
        return None
    return Code(window_bits, window_bits, step_weights, seed)


def _sliding_code(
    n_values: int, message_bits: int | None, rate: float | None, window_bits: int, seed: int
) -> Code | None:
    """The highest rate k/V within the budget; of equal rates, the smallest step."""
    for step in _sliding_rates(window_bits):
        if rate is not None and float(step) > rate:
            continue
        code = Code(window_bits, step.numerator, step.denominator, seed)
        if message_bits is None or code.message_bits(n_values) <= message_bits:
            return code
    return None


@cache
def _sliding_rates(window_bits: int) -> tuple[Fraction, ...]:
    """The rates k/V that a sliding code may have, from the highest on."""
    rates = {
        Fraction(k, weights)
        for k in range(1, min(_MAX_STEP_BITS, window_bits) + 1)
        for weights in range(1, MAX_STEP_WEIGHTS + 1)
    }
    rates |= {Fraction(k) for k in range(1, min(8, window_bits) + 1)}
    return tuple(sorted(rates, reverse=True))
