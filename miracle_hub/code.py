"""The code: the few integers that fix the map from message bits to candidates; and the format's limits."""

from dataclasses import dataclass

from miracle_hub.errors import OptionError, UnsupportedVersionError

QUANT_METHOD = "miracle"
# Of a repository: 1 has one stage, 2 may have more, 3 may also have exact tensors, 4 has a base.
FORMAT_VERSION = 4
STAGED_VERSION, EXACT_VERSION, BASED_VERSION = 2, 3, 4
MAX_WINDOW_BITS = 24
# One byte of message can then stand for at most 2,048 weights, which bounds what a hostile
# file of a given length can make a reader allocate.
MAX_STEP_WEIGHTS = 256
# Who codes and decodes; "auto" is Triton where tensors are on a GPU and numba elsewhere.
BACKENDS = ("auto", "cpu", "triton")
# Of the widest Hadamard rotation.
MAX_WIDTH_LOG2 = 15
# The width of the first probes on MiniLM; every figure in benchmarks/results was measured with it.
DEFAULT_WIDTH = 128
# Of a payload's tensor.
MAX_DIMENSIONS = 8
# Of a repository: files that refine one another.
MAX_STAGES = 9


def check_format_version(found: object, where: str) -> None:
    """Refuse a repository of a version that this package does not read.

    Raises:
        UnsupportedVersionError: it is newer, or none.
    """
    if found not in range(1, FORMAT_VERSION + 1):
        raise UnsupportedVersionError(
            f"{where}: this miracle-hub reads format versions up to {FORMAT_VERSION}, found {found!r}; "
            "upgrade: pip install -U miracle-hub"
        )


@dataclass(frozen=True)
class Code:
    """A window of `window_bits` that moves `step_bits` along the message per `step_weights` weights.

    `step_bits == window_bits` is the block code of MIRACLE (Havasi et al. 2019); smaller steps
    make the windows overlap, a bit-shift trellis (Tseng et al. 2024, QTIP) over the same
    pseudo-random candidates.

    Raises:
        OptionError: a parameter is out of range.
    """

    window_bits: int
    step_bits: int
    step_weights: int
    seed: int = 0
    stream_id: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("window_bits", 1, MAX_WINDOW_BITS),
            ("step_bits", 1, self.window_bits),
            ("step_weights", 1, MAX_STEP_WEIGHTS),
            ("seed", 0, 2**64 - 1),
            ("stream_id", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise OptionError(
                    f"code: {name} must be an integer from {low} to {high}, found {value!r}; "
                    "choose another value"
                )

    @property
    def overlap_bits(self) -> int:
        """Bits that two neighboring windows share; 0 for the block code."""
        return self.window_bits - self.step_bits

    @property
    def rate(self) -> float:
        """Bits per coded value of a long message."""
        return self.step_bits / self.step_weights

    def steps(self, n_weights: int) -> int:
        """Windows of a stream of `n_weights` values, the last of which may not use all of its own."""
        return -(-n_weights // self.step_weights)

    def message_bits(self, n_weights: int) -> int:
        """Exact length of the message of `n_weights` weights; 0 for an empty stream."""
        steps = self.steps(n_weights)
        return self.overlap_bits + self.step_bits * steps if steps else 0

    def message_bytes(self, n_weights: int) -> int:
        """The same in bytes, padded with zero bits."""
        return -(-self.message_bits(n_weights) // 8)

    def segments(self, n_weights: int) -> "tuple[tuple[int, Code], ...]":
        """Numbers of values and their codes, in order: all values have this one."""
        return ((n_weights, self),)


@dataclass(frozen=True)
class SplitCode:
    """Two codes of one stream, each with a message of its own: they meet sizes between those of two rates.

    Attributes:
        first: of the first `n_first` values.
        rest: of all others, of which there is one at least; the window, seed and stream_id are the same.

    Raises:
        OptionError: they are no codes of one stream.
    """

    first: Code
    n_first: int
    rest: Code

    def __post_init__(self) -> None:
        common = [(code.window_bits, code.seed, code.stream_id) for code in (self.first, self.rest)]
        if len(set(common)) > 1 or self.n_first < 1:
            raise OptionError(
                "code: expected two codes of one window, seed and stream_id, the first of one value or more, "
                f"found {self.first} of {self.n_first} and {self.rest}; choose others"
            )

    @property
    def window_bits(self) -> int:
        """Of both."""
        return self.first.window_bits

    @property
    def seed(self) -> int:
        """Of both."""
        return self.first.seed

    @property
    def stream_id(self) -> int:
        """Of both."""
        return self.first.stream_id

    def segments(self, n_weights: int) -> tuple[tuple[int, Code], ...]:
        """Numbers of values and their codes, in order."""
        return (self.n_first, self.first), (n_weights - self.n_first, self.rest)

    def steps(self, n_weights: int) -> int:
        """Windows of both messages."""
        return sum(code.steps(n) for n, code in self.segments(n_weights))

    def message_bits(self, n_weights: int) -> int:
        """Of both messages, and those that pad the first to a byte."""
        n_rest = n_weights - self.n_first
        return 8 * self.first.message_bytes(self.n_first) + self.rest.message_bits(n_rest)

    def message_bytes(self, n_weights: int) -> int:
        """Of both messages, each padded with zero bits."""
        return -(-self.message_bits(n_weights) // 8)


StreamCode = Code | SplitCode
