"""What every step of preparing a model shares: owns how it tells the person how it goes.

Used by model_store and the steps it calls, so that they say it alike and the libraries underneath
say nothing.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

# What is happening, and the fraction done where it is known. A download calls it from its threads.
Progress = Callable[[str, float | None], None]


class ModelError(Exception):
    """Said to the person as one line, no traceback."""


def silent(what: str, fraction: float | None) -> None:
    """Progress that nobody follows."""


def one_line(error: Exception) -> str:
    """What `error` says first: the rest of a library's message is not for the person."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Silences Python warnings, and what `logger_name` logs below an error."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
