import struct
import time

import pytest

from kvrelay.wire import inference_pb2 as pb
from router.field_count import has_more_fields

CHAT = pb.ChatRequest(
    request_id="x" * 300,
    messages=[pb.ChatMessage(role="user", content="é" * n) for n in range(20)],
    sampling=pb.SamplingParams(temperature=0.5, stop=["a"] * 30),
    priority=-1,
    ttft_deadline_ms=70_000,
)
UNKNOWN = b"\x99\x06" + struct.pack("<d", 1.0) + b"\x9d\x06" + struct.pack("<f", 1.0)


def test_fields_of_the_message_itself_are_counted():
    data = CHAT.SerializeToString() + UNKNOWN
    count = 20 + 4 + 2
    assert has_more_fields(data, count - 1)
    assert not has_more_fields(data, count)
    assert not has_more_fields(b"", 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,  # a number without end
        b"\x1a",  # no length
        b"\x1a\xff",
        b"\x0b\x0c",  # groups, which no message of ours has
        b"\x1a\x7fhi",  # longer than there is
    ],
)
def test_bytes_that_are_no_message_are_left_to_the_parser(data):
    assert not has_more_fields(data, 1)


def test_however_many_there_are_counting_takes_no_longer():
    def cost_s(data: bytes) -> float:
        began = time.perf_counter()
        assert has_more_fields(data, 1000)
        return time.perf_counter() - began

    few, many = b"\x1a\x00" * 2000, b"\x1a\x00" * 4_000_000
    assert min(cost_s(many) for _ in range(5)) < 10 * min(cost_s(few) for _ in range(5))
