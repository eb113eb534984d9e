"""A device profile: what it computes, and what of a file it refuses."""

import json

import pytest

from cluster.capacity.device import (
    BusyNeighbour,
    ByHand,
    DeviceProfile,
    HandOffTime,
    Measured,
    ProfileError,
    StepTime,
    attended,
)

STEP = StepTime(
    base_ms=2.0,
    ms_per_prompt_token=0.5,
    ms_per_attended=0.001,
    ms_per_sequence=0.25,
    ms_per_context_token=0.01,
)
PIECES = StepTime(ms_by_tokens=((1, 10.0), (11, 20.0), (21, 40.0)))


def profile(**changes: object) -> DeviceProfile:
    fields: dict[str, object] = {
        "name": "a device",
        "source": ByHand(text="a data sheet"),
        "step": STEP,
        "hand_offs": (
            HandOffTime(link="shm", fixed_ms=1.0, ms_per_block=0.1),
            HandOffTime(link="tcp", fixed_ms=2.0, ms_per_block=0.3),
        ),
        "router_ms": 3.0,
        "block_tokens": 16,
        "block_bytes": 368_640,
        "kv_blocks": 1000,
        "batch_max": 64,
        "chunk_tokens": 256,
    }
    return DeviceProfile(**{**fields, **changes})


def test_a_step_is_the_sum_of_its_parts():
    assert STEP.ms(100, 5050, 4, 1000) == pytest.approx(2 + 50 + 5.05 + 1 + 10)


def test_a_chunk_attends_to_what_is_before_each_token_and_to_itself():
    start, tokens = 7, 5
    assert attended(tokens, start) == sum(start + i + 1 for i in range(tokens))


@pytest.mark.parametrize(
    ("tokens", "ms"), [(1, 10.0), (6, 15.0), (11, 20.0), (16, 30.0), (21, 40.0), (31, 60.0)]
)
def test_layers_cost_by_pieces_and_go_on_beyond_the_last_one(tokens: int, ms: float):
    assert PIECES.ms(tokens - 1, 0, 1, 0) == pytest.approx(ms)
    assert PIECES.ms(tokens, 0, 0, 0) == pytest.approx(ms)


def test_below_the_first_piece_and_with_one_alone_the_layers_cost_the_same():
    assert StepTime(ms_by_tokens=((8, 10.0), (16, 20.0))).ms(2, 0, 0, 0) == 10.0
    assert StepTime(ms_by_tokens=((8, 10.0),)).ms(64, 0, 0, 0) == 10.0


def test_steps_in_a_row_cost_as_much_as_one_after_another():
    sequences, context = 3, 500
    each = [STEP.ms(0, 0, sequences, context + step * sequences) for step in range(20)]
    assert STEP.decode_ms(sequences, context, 20) == pytest.approx(sum(each))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"base_ms": -1.0},
        {"base_ms": float("nan")},
        {"base_ms": 1.0, "ms_by_tokens": ((2, 1.0), (2, 2.0))},
        {"base_ms": 1.0, "ms_by_tokens": ((1, 2.0), (2, 1.0))},
        {"base_ms": 1.0, "ms_per_token": 1.0},
    ],
)
def test_a_step_time_that_makes_no_sense_is_refused(fields: dict[str, object]):
    with pytest.raises(ValueError, match=r"Step|ms"):
        StepTime(**fields)


@pytest.mark.parametrize(
    "source",
    [
        ByHand(text="a data sheet"),
        Measured(machine="a cpu", command="kvrelay profile x", median_error=0.01, p90_error=0.05),
    ],
)
def test_a_file_gives_back_what_was_written(tmp_path, source):
    written = profile(
        source=source,
        step=PIECES,
        workers_per_host=2,
        busy_neighbour=BusyNeighbour(prefill=1.1, decode=1.3),
    )
    written.write(tmp_path / "device.json")
    assert DeviceProfile.read(tmp_path / "device.json") == written


def test_the_first_link_is_used_unless_another_is_named():
    assert profile().hand_off().link == "shm"
    assert profile().hand_off("tcp").ms(10) == pytest.approx(5.0)
    with pytest.raises(ProfileError, match="no link nccl: choose one of shm, tcp"):
        profile().hand_off("nccl")


def broken(change: dict[str, object]) -> str:
    return json.dumps({**json.loads(profile().model_dump_json()), **change})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("{}", "name: Field required"),
        (broken({"router_ms": -1}), "router_ms"),
        (broken({"kv_blocks": "many"}), "kv_blocks"),
        (broken({"speed": 1}), "speed: Extra inputs"),
        (broken({"source": {"how": "guessed"}}), "source"),
        (broken({"step": {"base_ms": 1, "ms_by_tokens": [[4, 2], [2, 4]]}}), "step: .*must grow"),
        (broken({"hand_offs": []}), "hand_offs"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text: str, wrong: str):
    path = tmp_path / "device.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=wrong) as refused:
        DeviceProfile.read(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ProfileError, match=r"none\.json: No such file"):
        DeviceProfile.read(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="No such file"):
        profile().write(tmp_path / "no" / "none.json")
