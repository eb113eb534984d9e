"""Where the tests keep what the engine and the commands cache: not among the user's own models.

Set before anything of kvrelay is imported. It outlives a session, so that only the first one
converts the real model and compiles the kernels.
"""

import os
from pathlib import Path

os.environ.setdefault("KVRELAY_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "kvrelay"))
