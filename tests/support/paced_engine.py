"""An engine whose steps take a set time, so that what a worker can do is no matter of weather."""

import time
from typing import Any


def pace(service: Any, step_ms: float) -> None:
    """Every step of this service's engine takes so long; its thread sleeps, and no core works."""
    runner = service._engine._runner
    step = runner.step

    def paced(*args: Any, **kwargs: Any) -> Any:
        end_s = time.monotonic() + step_ms / 1000
        result = step(*args, **kwargs)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return result

    runner.step = paced
