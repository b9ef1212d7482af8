"""Whether a compression is to run the model at all. Nothing of it is imported to answer that."""

from typing import Any

SELF, NONE = "self", "none"


def is_asked(calibrate: Any) -> bool:
    """Whether the option `calibrate` asks for any calibration."""
    return not (calibrate is None or (isinstance(calibrate, str) and calibrate == NONE))


def is_self(calibrate: Any) -> bool:
    """Whether the inputs are to be of the model's own making."""
    return isinstance(calibrate, str) and calibrate == SELF
