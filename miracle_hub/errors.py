"""Everything miracle-hub raises on purpose.

    MiracleError
    ├── SourceError (ValueError)         the model to compress
    │   ├── MissingWeightsError          no safetensors file where one was expected
    │   ├── SourceKindError              another kind of model than the verb takes
    │   ├── PickleRefusedError           weights exist only as pickle
    │   └── NonFiniteWeightError         NaN or infinity in a tensor
    ├── DataError (ValueError)           training data without what the task needs
    ├── CalibrationError (ValueError)    a model that cannot be run here, or not on what there is
    ├── BudgetError (ValueError)         a size or rate that cannot be met
    ├── OptionError (ValueError)         a code, order or rotation that cannot exist
    ├── ResumeError (ValueError)         a work folder of another run than the one that is to go on
    ├── BackendError (RuntimeError)      a backend that cannot run here, or not this
    ├── TrainingError (RuntimeError)     a loss or a gradient that is not finite
    ├── WrittenWeightError (RuntimeError) a weight whose posterior cannot follow what was done to it
    ├── ProcessError (RuntimeError)      another process of a distributed run failed, or has ended
    ├── OutputExistsError (FileExistsError)
    ├── OutputWriteError (OSError)       disk full, folder not writable
    ├── UploadError (OSError)            the Hub did not take a repository
    │   └── RemoteMismatchError          it holds other bytes than were sent
    └── FormatError (ValueError)         a file that is not what it claims to be
        ├── TruncatedPayloadError
        ├── ChecksumError                header or decoded tensor differ from their digest
        ├── BaseModelError               the model that a file adds its weights to is missing, or another
        └── UnsupportedVersionError

Every message says what was expected, what was found, where, and what to do.
"""


class MiracleError(Exception):
    """Base of every error that this package raises on purpose."""


class SourceError(MiracleError, ValueError):
    """The model to compress cannot be read."""


class MissingWeightsError(SourceError):
    """No safetensors weights were found."""


class SourceKindError(SourceError):
    """What was given is a model, but of another kind than this verb takes."""


class PickleRefusedError(SourceError):
    """The weights exist only as pickle, which can run code when it is opened."""


class NonFiniteWeightError(SourceError):
    """A tensor holds NaN or infinity."""


class DataError(MiracleError, ValueError):
    """Training data cannot be read, or lack what the task needs."""


class CalibrationError(MiracleError, ValueError):
    """A model cannot be run here, or nothing is known that it could be run on."""


class BudgetError(MiracleError, ValueError):
    """No choice of rates meets the requested size."""


class OptionError(MiracleError, ValueError):
    """A parameter of the code, the order or the rotation is out of range."""


class ResumeError(MiracleError, ValueError):
    """A run cannot go on from what its work folder holds: that is another run's, or no run's."""


class BackendError(MiracleError, RuntimeError):
    """The backend that was asked for cannot run here, or cannot do what was asked."""


class TrainingError(MiracleError, RuntimeError):
    """Training cannot go on: a loss or a gradient is not finite."""


class WrittenWeightError(MiracleError, RuntimeError):
    """A weight of a variational model was written to, tied or replaced, and its posterior cannot follow."""


class ProcessError(MiracleError, RuntimeError):
    """Another process of a distributed run failed, has ended, or has another model."""


class OutputExistsError(MiracleError, FileExistsError):
    """The output folder exists and overwriting was not asked for."""


class OutputWriteError(MiracleError, OSError):
    """The output could not be written."""


class UploadError(MiracleError, OSError):
    """A repository could not be uploaded, or not as it was to be."""


class RemoteMismatchError(UploadError):
    """After an upload the Hub holds other files than the local ones."""


class FormatError(MiracleError, ValueError):
    """A file is not what it claims to be."""


class TruncatedPayloadError(FormatError):
    """A payload is shorter or longer than its header says."""


class ChecksumError(FormatError):
    """A header or a decoded tensor differs from its recorded checksum."""


class BaseModelError(FormatError):
    """The base, to whose weights a file adds its own, is missing, incomplete, or another model."""


class UnsupportedVersionError(FormatError):
    """The file was written by a newer version of the format."""
