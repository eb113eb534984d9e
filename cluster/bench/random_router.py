"""A router that places at random: what `kvrelay bench prefix` compares placement with.

Started by cluster/serving.py in the place of router/main.py, when the bench says so. All but the
choice of workers is the real router's.
"""

import random
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

from router import dispatcher, main, policy

_dice = random.Random(0)


def place_at_random(
    prefill: Sequence[policy.PrefillView], decode: Sequence[policy.DecodeView], **wish: Any
) -> policy.Placement | None:
    """Any pair that the real policy would take if it were the only one."""
    pairs = list(product(prefill, decode))
    for p, d in _dice.sample(pairs, len(pairs)):
        placement = policy.place([p], [d], **wish)
        if placement is not None:
            return placement
    return None


def inject() -> None:
    """Whoever calls policy.place gets ours from now on."""
    assert vars(dispatcher)["place"] is policy.place, "placement is called from elsewhere"
    vars(dispatcher)["place"] = place_at_random


if __name__ == "__main__":
    inject()
    sys.exit(main.main())
