"""Seeds of tests that draw what they do, and how a failing one is played again.

KVRELAY_SEED is the first seed, KVRELAY_SEEDS how many the full forms take.
"""

import contextlib
import os
from collections.abc import Iterator

SEED = int(os.environ.get("KVRELAY_SEED", "1"))
SEEDS = int(os.environ.get("KVRELAY_SEEDS", "20"))


@contextlib.contextmanager
def playable(seed: int) -> Iterator[None]:
    """Adds to what is raised inside how to have it again."""
    try:
        yield
    except BaseException as error:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        settings = f"KVRELAY_SEED={seed} KVRELAY_SEEDS=1"
        error.add_note(f"seed {seed}; again: {settings} pytest -m 'slow or not slow' '{test}'")
        raise
