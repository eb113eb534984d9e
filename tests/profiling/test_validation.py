"""Simulated beside real: what is compared, and what is said of it."""

import pytest

from cluster.bench.report import BenchError
from cluster.capacity.device import ByHand, DeviceProfile, HandOffTime, StepTime
from cluster.model_store import PreparedModel
from cluster.preparation import silent
from cluster.profiling import validation
from cluster.profiling.validation import ValidationAsk, compared, validate, verdict
from cluster.workload.asks import Ask
from cluster.workload.figures import Figures, figures
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo

ASKED = ValidationAsk(rate=5.0, seconds=10.0, warm_up_s=2.0, quantize="none")
DEVICE = DeviceProfile(
    name="a device",
    source=ByHand(text="a test"),
    step=StepTime(base_ms=5.0, ms_per_prompt_token=0.1, ms_per_sequence=0.5),
    hand_offs=(HandOffTime(link="shm", fixed_ms=1.0, ms_per_block=0.1),),
    router_ms=2.0,
    block_tokens=16,
    block_bytes=1 << 16,
    kv_blocks=1000,
    batch_max=64,
    chunk_tokens=256,
)


def outcome(at_s: float, ttft_s: float, gap_s: float, error: str = "") -> Outcome:
    ask = Ask(at_s, 100, 3)
    first = at_s + ttft_s
    return Outcome(ask, at_s, first, first + 2 * gap_s, 3, [gap_s, gap_s], error=error)


def found(ttft_s: float, gap_s: float) -> Figures:
    return figures([outcome(i, ttft_s, gap_s) for i in range(4)], Slo(1000, 100))


def test_simulated_stands_beside_real():
    rows = {row.name: row for row in compared(real=found(0.1, 0.01), simulated=found(0.2, 0.02))}
    assert rows["ttft/p50"].value == pytest.approx(200)
    assert rows["ttft/p50"].baseline == pytest.approx(100)
    assert rows["tpot/p90"].ratio == pytest.approx(2.0)
    assert "queue/p50" not in rows  # nobody has told it


@pytest.mark.parametrize(
    ("ttft_s", "gap_s", "said"),
    [
        (0.112, 0.0102, "holds: ttft/p50 is off the most, by 12 %"),
        (0.10, 0.0080, "does not hold: tpot/p50 is off the most, by 20 %"),
    ],
)
def test_the_verdict_names_what_is_off_the_most(ttft_s: float, gap_s: float, said: str):
    assert said in verdict(compared(found(0.1, 0.01), found(ttft_s, gap_s)))


@pytest.fixture
def simulated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is real is simulated, too."""
    monkeypatch.setattr(validation, "pack_weights", lambda *asked: None)
    monkeypatch.setattr(
        validation,
        "_for_real",
        lambda model, options, workload, *_: validation._simulated(DEVICE, options, workload),
    )


def model(tmp_path) -> PreparedModel:
    return PreparedModel("tiny", tmp_path)


def test_the_same_workload_is_asked_of_both(tmp_path, simulated_twice: None):
    report = validate(model(tmp_path), DEVICE, ASKED, silent)
    assert {row.ratio for row in report.rows if row.ratio} == {1.0}
    assert report.machine["requests"] == sum(ask.at_s >= 2.0 for ask in ASKED.workload().asks)


def test_what_failed_is_said(tmp_path, simulated_twice: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        validation, "_for_real", lambda *_: [outcome(3.0, 0.1, 0.01, error="UNAVAILABLE")]
    )
    with pytest.raises(BenchError, match=r"for real: 1 requests failed \(UNAVAILABLE\): lower"):
        validate(model(tmp_path), DEVICE, ASKED, silent)


def test_a_warm_up_that_leaves_nothing_is_refused(
    tmp_path, simulated_twice: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(validation, "_for_real", lambda *_: [outcome(1.0, 0.1, 0.01)])
    with pytest.raises(BenchError, match="no request is left after the warm-up"):
        validate(model(tmp_path), DEVICE, ASKED, silent)
