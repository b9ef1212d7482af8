"""What processes that torchrun starts for tests have in common."""

from collections.abc import Callable
from typing import Any


def caught(run: Callable[[], Any]) -> str:
    """The kind and the text of the error that something raises."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
