import pickle
from array import array

from cluster.capacity.parcels import OutcomesParcel, WorkloadParcel
from cluster.workload.asks import Ask, Workload
from cluster.workload.outcomes import Outcome

ASKS = (
    Ask(0.0, 10, 3),
    Ask(0.5, 20, 2, (1, 2), "chat"),
    Ask(0.5, 20, 2, (1, 2), "chat"),  # equal to the one before, and another request
)
WORKLOAD = Workload("some", ASKS, block_tokens=64)
OUTCOMES = [
    Outcome(
        ASKS[2],
        0.5,
        first_token_s=0.7,
        last_token_s=0.75,
        tokens=2,
        gaps_s=array("f", [0.05]),
        cached_tokens=16,
        queue_ms=1.0,
        prefill_ms=2.0,
        hand_off_ms=3.0,
    ),
    Outcome(ASKS[1], 0.6, error="UNAVAILABLE"),
    Outcome(ASKS[0], 0.0, 0.1, 0.3, tokens=3, gaps_s=array("f", [0.1, 0.1])),
]


def posted(parcel):
    return pickle.loads(pickle.dumps(parcel)).open


def test_a_workload_comes_as_it_was_sent():
    assert posted(WorkloadParcel.of(WORKLOAD))() == WORKLOAD


def test_outcomes_come_as_they_were_sent_each_of_its_own_ask():
    came = posted(OutcomesParcel.of(OUTCOMES, ASKS))(ASKS)

    assert came == OUTCOMES
    assert all(one.ask is sent.ask for one, sent in zip(came, OUTCOMES, strict=True))
