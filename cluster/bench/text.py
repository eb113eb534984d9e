"""The text that a perplexity is measured over, and the windows it is read in.

Needs no torch: commands.py looks at the text before anything heavy is loaded.
"""

from collections.abc import Sequence
from pathlib import Path

from cluster.bench.report import BenchError
from cluster.preparation import one_line

TEXT = Path(__file__).parent / "texts" / "quality.txt"
WINDOW_TOKENS = 1024
TOKENS_MIN = 64

Windows = list[list[int]]


def read_text(file: Path) -> str:
    """Raises BenchError: there is no such file, or it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BenchError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise BenchError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error


def windows_of(tokens: Sequence[int], window_tokens: int) -> Windows:
    """The text in pieces of `window_tokens`; a last piece too short to mean anything is dropped.

    Raises:
        BenchError: the text is too short.
    """
    if len(tokens) < TOKENS_MIN:
        raise BenchError(f"the text has {len(tokens)} tokens: it takes at least {TOKENS_MIN}")
    starts = range(0, len(tokens), window_tokens)
    pieces = [list(tokens[at : at + window_tokens]) for at in starts]
    return [piece for piece in pieces if len(piece) >= TOKENS_MIN] or pieces[:1]
