"""A router that places at random: what `kvrelay bench prefix` compares placement with.

Started by cluster/serving.py in the place of router/main.py, when the bench says so. All but the
choice of workers is the real router's; prompts are always handed over, as a cluster does that
knows no better. Of many workers of a role only the less busy ones are candidates: with more than
two, this baseline is better than chance.
"""

import random
import sys
from collections.abc import Sequence
from itertools import product

from router import choosing, main, policy
from router.policy import Choice, Wish
from router.prediction import DecodeView, PrefillView

_dice = random.Random(0)


def place_at_random(
    prefill: Sequence[PrefillView], decode: Sequence[DecodeView], wish: Wish
) -> Choice | None:
    """Any pair that the real policy would take now if there were no other; else one to wait for."""
    pairs = list(product(prefill, decode))
    choices = [
        policy.place([p], [d], wish._replace(local=False))
        for p, d in _dice.sample(pairs, len(pairs))
    ]
    able = [choice for choice in choices if choice is not None]
    return next((choice for choice in able if choice.now), able[0] if able else None)


def inject() -> None:
    """Whoever calls policy.place gets ours from now on."""
    assert vars(choosing)["place"] is policy.place, "placement is called from elsewhere"
    vars(choosing)["place"] = place_at_random


if __name__ == "__main__":
    inject()
    sys.exit(main.main())
