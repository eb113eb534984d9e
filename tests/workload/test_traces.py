"""Reading traces of both kinds, what is wrong with a line, and scaling."""

import json
from pathlib import Path

import pytest

from cluster.workload.asks import Ask, Workload, WorkloadError, own_rate
from cluster.workload.traces import read_trace, scaled

HEADING = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = (
    f"{HEADING}2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.4799607,3180,8\n\n2023-11-16 18:18:03.9799600,110,0"
)


def written(folder: Path, text: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mooncake(*lines: tuple[int, int, int, list[int]]) -> str:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return "\n".join(json.dumps(dict(zip(keys, line, strict=True))) for line in lines)


def test_an_azure_trace_begins_at_0_and_asks_for_a_token_at_least(tmp_path: Path) -> None:
    workload = read_trace(written(tmp_path, AZURE))
    assert workload.name == "trace"
    assert [(ask.prompt_tokens, ask.answer_tokens) for ask in workload.asks] == [
        (4808, 10),
        (3180, 8),
        (110, 1),
    ]
    assert [ask.at_s for ask in workload.asks] == pytest.approx([0, 0.5, 60], abs=2e-6)


def test_times_with_a_zone_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = f"\ufeff{HEADING}2024-05-10 00:00:01+00:00,5,6\n2024-05-10 02:00:00+02:00,7,8\n"
    assert read_trace(written(tmp_path, text)).asks == (Ask(0.0, 7, 8), Ask(1.0, 5, 6))


def test_a_mooncake_trace_keeps_which_blocks_are_shared(tmp_path: Path) -> None:
    text = mooncake((3000, 1030, 4, [7, 8, 9]), (0, 512, 5, [7]), (3000, 600, 6, []))
    workload = read_trace(written(tmp_path, text))
    assert workload.block_tokens == 512
    assert workload.asks == (
        Ask(0.0, 512, 5, (7,)),
        Ask(3.0, 1030, 4, (7, 8, 9)),
        Ask(3.0, 600, 6),
    )


GOOD = '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "there are no requests"),
        (HEADING, "there are no requests"),
        ("time,tokens\n", "line 1: neither the heading of an Azure trace"),
        (f"{HEADING}2023-11-16 18:17:03,4808\n", "line 2: 2 fields instead of 3"),
        (f"{HEADING}\nyesterday,1,2\n", "line 3: TIMESTAMP is no time: 'yesterday'"),
        (f"{HEADING}2023-11-16 18:17:03,many,2", "line 2: ContextTokens is no integer: 'many'"),
        (f"{HEADING}2023-11-16 18:17:03,1,-2", "line 2: GeneratedTokens is no number of tokens"),
        (f'{HEADING}2023-11-16 18:17:03,1,"2', "line 2: no CSV"),
        (f"{HEADING}2023-11-16 18:17:03,\ud7ff,2", "line 2: ContextTokens is no integer"),
        (HEADING.encode() + b"\xff,1,2\n", "line 2: no text in UTF-8"),
        (GOOD + "{", "line 2: no JSON"),
        (GOOD + "[" * 5000, "line 2: no JSON"),
        (GOOD + "[1]", "line 2: no JSON object"),
        (GOOD + '{"timestamp": 0}', "line 2: there is no input_length"),
        (GOOD.replace("0", "true"), "line 1: timestamp is no number: True"),
        (GOOD.replace("0", "NaN"), "line 1: timestamp is no number: nan"),
        (GOOD.replace("5", "5.5"), "line 1: input_length is no number of tokens: 5.5"),
        (GOOD.replace("[1]", '["a"]'), "line 1: hash_ids is no list of integers: ['a']"),
        (GOOD.replace("[1]", "[1, 2]"), "line 1: 2 hash_ids for 5 tokens, which are 1 blocks"),
    ],
)
def test_one_line_says_what_is_wrong_and_where(
    tmp_path: Path, text: str | bytes, complaint: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(WorkloadError) as raised:
        read_trace(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert len(message.splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(WorkloadError, match="Is a directory"):
        read_trace(tmp_path)


# ---- scaling

WORKLOAD = Workload(
    "three",
    (Ask(0.0, 1024, 100, (1, 2)), Ask(2.0, 1300, 1, (1, 2, 3)), Ask(8.0, 300, 50, (4,))),
)


def test_in_time_by_a_factor_or_to_a_rate() -> None:
    assert [ask.at_s for ask in scaled(WORKLOAD, rate=4).asks] == [0, 0.5, 2]
    faster = scaled(WORKLOAD, requests_per_s=3.0)
    assert own_rate(faster.asks) == pytest.approx(3.0)
    assert own_rate(scaled(WORKLOAD, requests_per_s=3.0, requests=2).asks) == pytest.approx(3.0)


def test_in_length_equal_blocks_stay_equal_and_as_large_a_share() -> None:
    short = scaled(WORKLOAD, length=1 / 32)
    assert short.block_tokens == 16
    assert [(ask.prompt_tokens, ask.answer_tokens) for ask in short.asks] == [
        (32, 3),
        (41, 1),
        (9, 2),
    ]
    assert [ask.prefix for ask in short.asks] == [ask.prefix for ask in WORKLOAD.asks]


@pytest.mark.parametrize("length", [1e-6, 0.0123, 0.05, 0.9, 1.7])
def test_never_more_blocks_than_the_prompt_has(length: float) -> None:
    fitted = scaled(WORKLOAD, length=length)
    for ask in fitted.asks:
        assert ask.prompt_tokens >= 1
        assert ask.answer_tokens >= 1
        assert (len(ask.prefix) - 1) * fitted.block_tokens < ask.prompt_tokens


def test_limits_of_requests_and_of_seconds() -> None:
    assert len(scaled(WORKLOAD, requests=2).asks) == 2
    assert len(scaled(WORKLOAD, requests=9).asks) == 3
    assert len(scaled(WORKLOAD, seconds=2.0).asks) == 1
    assert len(scaled(WORKLOAD, seconds=2.1, rate=4).asks) == 3  # of the scaled time


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"length": -1}, {"seconds": float("nan")}, {"requests_per_s": 0}]
)
def test_a_scale_has_to_be_above_0(wrong: dict[str, float]) -> None:
    with pytest.raises(WorkloadError, match="must be above 0"):
        scaled(WORKLOAD, **wrong)


def test_requests_that_are_due_at_once_have_no_rate() -> None:
    with pytest.raises(WorkloadError, match="all due at once"):
        scaled(WORKLOAD, requests_per_s=1.0, requests=1)
