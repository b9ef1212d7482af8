"""Everything these kernels raise on purpose.

    KernelError
    ├── KernelInputError (ValueError)         a tensor or a number that an op cannot take
    └── KernelUnavailableError (RuntimeError) no Triton, or no device for it

Every message says what was expected, what was found, where, and what to do.
"""


class KernelError(Exception):
    """Base of every error that these kernels raise on purpose."""


class KernelInputError(KernelError, ValueError):
    """A tensor or a number that an op cannot take."""


class KernelUnavailableError(KernelError, RuntimeError):
    """Triton is not installed, or has no device to run on."""
