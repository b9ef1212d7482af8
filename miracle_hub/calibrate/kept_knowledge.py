"""What is known of a model before anything is coded, and is known again when a killed run goes on."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from miracle_hub.calibrate.inputs import Inputs
from miracle_hub.calibrate.sensitivity import Sensitivity
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.coding.backend import Backend
from miracle_hub.errors import ResumeError

_INPUTS, _SENSITIVITY = "inputs", "sensitivity"


def kept_inputs(kept: Kept, make: Callable[[], Inputs], is_self: bool) -> Inputs:
    """Inputs as they were before.

    Those that the model made by itself, which takes minutes, are kept. Given ones are read again, and their
    digest is compared.

    Raises:
        ResumeError: data were given, and are others than before.
    """
    found = kept.load(_INPUTS)
    if is_self and found is not None:
        return Inputs.of_tensors(found.tensors, found.facts)
    inputs = make()
    if found is None:
        kept.save(_INPUTS, inputs.tensors() if is_self else {}, **inputs.facts)
    elif found.facts["digest"] != inputs.digest:
        raise ResumeError(
            f"{kept.folder}: expected the data that the interrupted run was calibrated on "
            f"({found.facts['said']}; SHA-256 {found.facts['digest'][:16]}…), found others ({inputs.said}; "
            f"SHA-256 {inputs.digest[:16]}…); give those, give another folder as work, or remove this one to "
            "start anew"
        )
    return inputs


def kept_sensitivity(kept: Kept, make: Callable[[], Sensitivity]) -> Sensitivity:
    """Measured once: it depends on no size of a file."""
    if (found := kept.load(_SENSITIVITY)) is not None:
        return Sensitivity.of_tensors(found.tensors, found.facts)
    made = make()
    kept.save(_SENSITIVITY, made.tensors(), **made.facts)
    return made


def kept_of_jobs(kept: Kept, jobs: Sequence[Job], backend: Backend) -> Kept:
    """For what depends on all these jobs, whose curvature is known from what `kept` depends on already."""
    return kept.given(*(replace(job, curvature=None).digest(backend) for job in jobs))
