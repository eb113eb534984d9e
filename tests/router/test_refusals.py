import pytest

from router.commands import (
    DeadlineError,
    ExhaustedTrouble,
    PoisonTrouble,
    QueueFullError,
    TakenOverTrouble,
)
from router.refusals import RETRY_HINT_MS, Reason, Refusal, refusal


@pytest.mark.parametrize("kind", [QueueFullError, DeadlineError, ExhaustedTrouble])
@pytest.mark.parametrize(
    ("predicted_ms", "hint_ms"),
    [(None, RETRY_HINT_MS), (0.0, 100), (2345.6, 2345), (1e9, 60_000)],
)
def test_who_finds_no_room_is_told_when_there_may_be_some(kind, predicted_ms, hint_ms):
    told = refusal(kind("no room", predicted_ms))
    assert told is not None
    assert (told.reason, told.retry_ms) == (Reason.EXHAUSTED, hint_ms)
    assert str(told) == f"no room; try again in {hint_ms} ms"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(PoisonTrouble("why"), Reason.POISON), (TakenOverTrouble(), Reason.TAKEN_OVER)],
)
def test_what_is_not_to_be_tried_again_has_no_hint(trouble, reason):
    told = refusal(trouble)
    assert told is not None
    assert (told.reason, told.retry_ms, str(told)) == (reason, None, str(trouble))


def test_a_message_that_echoes_much_of_a_client_is_cut_to_what_a_header_holds():
    words = "model '" + "\U0010ffff" * 100_000 + "' is not served here; 'tiny' is"
    told = str(Refusal(Reason.NOT_FOUND, words))
    assert told.startswith("model '\U0010ffff")
    assert told.endswith("\U0010ffff' is not served here; 'tiny' is")
    assert 3 * len(told.encode()) < 8 << 10  # percent-encoded
    assert str(Refusal(Reason.NOT_FOUND, "short")) == "short"
