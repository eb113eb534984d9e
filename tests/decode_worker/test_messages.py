import pytest

from decode_worker.messages import REFUSALS, refusal_code
from decode_worker.reservation import InvalidReservationError
from kvrelay.wire.worker_pb2 import FailureCode


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_router_is_told_of_each_refusal_by_its_code(kind):
    assert refusal_code(kind("why")) == REFUSALS[kind]


def test_a_refusal_of_a_kind_is_told_as_the_kind():
    class TooLongError(InvalidReservationError):
        pass

    assert refusal_code(TooLongError("why")) == FailureCode.FAILURE_CODE_INVALID
