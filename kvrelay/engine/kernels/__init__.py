"""What numba compiles at run time: no compiler is needed on the user's machine.

The result is kept in the cache, under a name that covers these very files: numba itself looks only
at the file that a function is in, not at what it calls.
"""

import hashlib
from pathlib import Path

import numba

from kvrelay.cache import default_cache


def _digest() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), here.parent / "shapes.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


numba.config.CACHE_DIR = str(default_cache() / "kernels" / _digest())
