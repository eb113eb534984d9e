"""The shape that all benches share, how two programs are timed, and the machine's description."""

import json

import pytest
from rich.console import Console

from cluster.bench.machine import OtherPrograms, QuietLooks, describe_machine, unrest
from cluster.bench.report import Report, Row
from cluster.bench.timing import Budget, interleaved_medians, timed

MACHINE = {"cpu": "Some CPU", "isa": ["avx2", "avx512f"], "gemm_gflop_s": 244.84}


def shown(report: Report) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.table("transformers"))
    return capture.get()


def test_json_is_one_object_with_null_where_nothing_was_compared() -> None:
    rows = [Row("prefill/128", 900.0, "tokens/s", 600.0, 1000.0), Row("decode/b1/c16", 3, "x")]

    found = json.loads(Report(MACHINE, rows, ["a note"]).to_json())

    assert found == {
        "machine": MACHINE,
        "rows": [
            {
                "name": "prefill/128",
                "value": 900.0,
                "unit": "tokens/s",
                "baseline": 600.0,
                "ratio": 1.5,
                "limit_ratio": 0.9,
            },
            {
                "name": "decode/b1/c16",
                "value": 3,
                "unit": "x",
                "baseline": None,
                "ratio": None,
                "limit_ratio": None,
            },
        ],
    }


def test_a_value_that_is_not_a_number_is_never_written_as_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report(MACHINE, [Row("x", float("nan"), "s")]).to_json()


def test_table_has_every_figure_and_fits_a_terminal() -> None:
    rows = [
        Row("prefill/1024", 1234.5, "tokens/s", 617.25, 1500.0),
        Row("decode/b16/c1024", 33.333, "tokens/s", 30.0, 55.5),
    ]

    text = shown(Report(MACHINE, rows))

    assert max(map(len, text.splitlines())) <= 80
    header, _, *lines = [line.split() for line in text.splitlines() if line.strip()]
    assert " ".join(header) == "name value unit transformers ratio limit of limit"
    assert [" ".join(line) for line in lines] == [
        "prefill/1024 1,234 tokens/s 617.2 2.00x 1,500 82 %",
        "decode/b16/c1024 33.33 tokens/s 30.00 1.11x 55.50 60 %",
    ]


def test_table_leaves_out_columns_that_no_row_fills() -> None:
    text = shown(Report(MACHINE, [Row("a", 1.0, "s", limit=2.0)]))

    assert "transformers" not in text
    assert "limit" in text
    assert "limit" not in shown(Report(MACHINE, [Row("a", 1.0, "s", baseline=2.0)]))


def test_heading_names_the_machine() -> None:
    assert Report(MACHINE, []).heading() == "cpu Some CPU · isa avx2 avx512f · gemm_gflop_s 244.8"


def test_machine_says_what_it_is_and_what_runs_on_it() -> None:
    machine = describe_machine(threads=3)

    assert machine["cpu"]
    assert machine["threads"] == 3
    assert machine["cores"] >= 1
    assert {"kvrelay", "torch", "transformers"} <= machine.keys()
    json.dumps(machine)


def test_own_work_is_not_that_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(100.0, 50.0, 7.0), (110.0, 65.0, 17.0)])
    monkeypatch.setattr("cluster.bench.machine._processor_seconds", lambda: next(seconds))

    assert OtherPrograms().cores_busy() == 0.5


def test_other_programs_are_looked_at_while_a_bench_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = [(100.0, 50.0, 7.0), (100.5, 50.1, 7.0), (200.0, 99.0, 8.0), (200.5, 99.4, 8.1)]
    monkeypatch.setattr("cluster.bench.machine._processor_seconds", lambda: moments.pop(0))
    monkeypatch.setattr("cluster.bench.machine._LOOK_S", 0.0)

    assert QuietLooks().cores_busy() == 0.4


def test_other_programs_are_heard_of_now() -> None:
    assert OtherPrograms().cores_busy() >= 0.0


def test_a_machine_that_was_not_quiet_is_a_note() -> None:
    assert unrest(0.1) == []
    assert "0.8 cores busy" in unrest(0.8)[0]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_sides_take_turns_and_the_median_counts() -> None:
    clock, order = Clock(), []

    def side(name: str, times_s: list[float]):
        def work() -> float:
            order.append(name)
            taken = times_s.pop(0)
            clock.now_s += taken
            return taken

        return work

    budget = Budget(rounds_min=3, row_s=0.0, turn_s=0.0)
    sides = [side("a", [9.0, 1.0, 2.0]), side("b", [4.0, 4.0, 5.0])]

    assert interleaved_medians(sides, budget, clock=clock) == [2.0, 4.0]
    assert order == ["a", "b"] * 3


def test_short_work_is_repeated_in_its_turn_until_the_time_of_the_row_is_over() -> None:
    clock, order = Clock(), []

    def side(name: str, taken_s: float):
        def work() -> float:
            order.append(name)
            clock.now_s += taken_s
            return taken_s

        return work

    interleaved_medians([side("a", 1.0), side("b", 3.0)], Budget(2, 13.0, 3.0), clock=clock)

    assert order == [*"aaab"] * 3


def test_timed_says_how_long_the_work_took() -> None:
    clock = Clock()

    def work() -> None:
        clock.now_s += 0.5

    assert timed(work, clock=clock) == 0.5
