"""What the metrics page says of what has happened."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from router_cases import router_config

from kvrelay.wire import inference_pb2, worker_pb2
from kvrelay.wire.inference_pb2 import Finished
from router.admission import Sampling
from router.metrics import Metrics
from router.policy import Placement
from router.refusals import Reason
from router.request import Request, Times
from router.workers import Workers


def values(metrics: Metrics) -> dict[str, float]:
    """By name and labels, as in the page."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for name, labels, value, *_ in family.samples:
            shown = ",".join(f"{key}={labels[key]}" for key in sorted(labels))
            found[f"{name}{{{shown}}}" if shown else name] = value
    return found


def request(**times: object) -> Request:
    made = Request("r", [1, 2, 3], Sampling(0, 0, 1, 0, 4, (), ()), Times(1000.0, **times))
    made.answer = [7, 8, 9]
    return made


ANSWERED = {
    "prefill_began_at_ms": 1020.0,
    "first_token_at_ms": 1200.0,
    "last_token_at_ms": 1300.0,
    "prefill_ms": 150.0,
    "kv_bytes": 4096,
    "kv_exposed_ms": 2.0,
    "transport": "shm",
    "cached_tokens": 2,
}


def test_a_request_that_was_answered():
    metrics = Metrics()
    finished = Finished(reason=inference_pb2.FINISH_REASON_LENGTH)
    metrics.ended("http", finished, request(**ANSWERED))
    seen = values(metrics)
    assert seen["kvrelay_requests_total{outcome=length,protocol=http}"] == 1
    assert seen["kvrelay_prompt_tokens_total"] == 3
    assert seen["kvrelay_cached_tokens_total"] == 2
    assert seen["kvrelay_kv_bytes_total{transport=shm}"] == 4096
    sums = {
        "ttft": 0.2,
        "tpot": 0.05,
        "queue_wait": 0.02,
        "prefill": 0.15,
        "request": 0.3,
        "kv_exposed": 0.002,
    }
    for name, total_s in sums.items():
        assert seen[f"kvrelay_{name}_seconds_sum"] == pytest.approx(total_s)
        assert seen[f"kvrelay_{name}_seconds_count"] == 1


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        (None, "cancelled"),
        (Reason.EXHAUSTED, "exhausted"),
        (Finished(reason=inference_pb2.FINISH_REASON_STOP), "stop"),
    ],
)
def test_how_requests_end(outcome, name):
    metrics = Metrics()
    metrics.ended("grpc", outcome, request())
    seen = values(metrics)
    assert seen[f"kvrelay_requests_total{{outcome={name},protocol=grpc}}"] == 1
    assert seen["kvrelay_ttft_seconds_count"] == 0
    metrics.refused("grpc", Reason.UNAUTHENTICATED)
    refused = "kvrelay_requests_total{outcome=unauthenticated,protocol=grpc}"
    assert values(metrics)[refused] == 1


def test_gaps_between_tokens():
    metrics = Metrics()
    metrics.generated(1, None)
    metrics.generated(1, 15.0)
    metrics.generated(4, 100.0)  # four that came together: 25 ms each
    metrics.generated(1, 60_000.0)
    seen = values(metrics)
    assert seen["kvrelay_generated_tokens_total"] == 7
    assert seen["kvrelay_itl_seconds_count"] == 6
    assert seen["kvrelay_itl_seconds_sum"] == pytest.approx(60.115)
    buckets = [("0.01", 0), ("0.02", 1), ("0.03", 5), ("10", 5), ("+Inf", 6)]
    for bound, count in buckets:
        key = f"kvrelay_itl_seconds_bucket{{le={bound}}}"
        assert seen.get(key, seen.get(key.replace("10}", "10.0}"))) == count


def test_placements():
    metrics = Metrics()
    metrics.placed(worker_pb2.Reserve(attempt=1))
    metrics.placed(worker_pb2.Reserve(attempt=2, prefill_here=True))
    seen = values(metrics)
    assert seen["kvrelay_placements_total{kind=prefill_worker}"] == 1
    assert seen["kvrelay_placements_total{kind=local}"] == 1
    assert seen["kvrelay_retries_total"] == 1


@pytest.mark.parametrize(("prefill", "kind"), [(None, "local"), ("p1", "prefill_worker")])
def test_what_was_predicted_is_compared_with_what_came(prefill, kind):
    metrics = Metrics()
    placed = request(**ANSWERED)
    placed.placement = Placement(prefill, "d1", 60.0, 25.0, 3)
    placed.placed_at_ms, placed.attempt = 1080.0, 1
    metrics.ended("grpc", None, placed)
    seen = values(metrics)
    for of, ratio in (("ttft", 2), ("tpot", 2)):
        assert seen[f"kvrelay_prediction_ratio_sum{{kind={kind},of={of}}}"] == ratio
        assert seen[f"kvrelay_prediction_ratio_count{{kind={kind},of={of}}}"] == 1


def test_a_request_that_was_placed_again_says_nothing_of_predictions():
    metrics = Metrics()
    placed = request(**ANSWERED)
    placed.placement = Placement("p1", "d1", 60.0, 25.0, 3)
    for placed.attempt in (0, 2):
        metrics.ended("grpc", None, placed)
    assert not [name for name in values(metrics) if "prediction_ratio_count" in name]


def test_workers_are_those_of_now():
    metrics = Metrics()
    workers = Workers(router_config())
    fleet = SimpleNamespace(requests=(3, 2), workers=workers, connected=lambda role: 1)
    metrics.watch(fleet)
    info = worker_pb2.WorkerInfo(blocks_total=50, layout={"block_size": 16})
    workers.prefill_up("p-1", info)
    workers.decode_up("d-1", info)
    workers.prefill_load("p-1", worker_pb2.PrefillLoad(queued_tokens=9), refused=False)
    load = worker_pb2.DecodeLoad(blocks_free=20, running=4, queued_tokens=7)
    workers.decode_load("d-1", load, refused=False)
    seen = values(metrics)
    assert seen["kvrelay_requests_running"] == 3
    assert seen["kvrelay_requests_queued"] == 2
    assert seen["kvrelay_workers{role=decode}"] == 1
    assert seen["kvrelay_worker_queued_tokens{instance=p-1,role=prefill}"] == 9
    assert seen["kvrelay_worker_queued_tokens{instance=d-1,role=decode}"] == 7
    assert seen["kvrelay_worker_blocks_free{instance=d-1,role=decode}"] == 20
    assert seen["kvrelay_worker_blocks_total{instance=d-1,role=decode}"] == 50
    assert seen["kvrelay_worker_running{instance=d-1,role=decode}"] == 4
    workers.down("d-1")
    assert not [name for name in values(metrics) if "d-1" in name]
