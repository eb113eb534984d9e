"""Requests made up from the OpenAPI document, right and wrong ones, against a real cluster.

KVRELAY_GENERATED_REQUESTS is the number for each route, once of right and once of wrong ones. Wrong
ones, and right ones where no answer has to be computed, are also sent beside streams of tokens, as
in test_grpc_fuzz.py: nobody dies, and the streams get their tokens, in time.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Iterator

import httpx2
import pytest
import requests
import schemathesis
from bystanders import Bystanders, sent_in_turns
from call_sender import CallSender, written
from cluster_thread import cluster_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from local_cluster import local_cluster
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiny_models import make_endless, make_slow
from waiting import until

from router.http.document import document

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

EXAMPLES = int(os.environ.get("KVRELAY_GENERATED_REQUESTS", "150"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
CALLS_MIN = 1000  # beside streams: the same ones again where there are fewer
PER_S = 50.0
P99_RATIO_MAX = 1.2
QUIET_S = 10.0
GENERATED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = [(path, method) for path, item in document()["paths"].items() for method in item]


@pytest.fixture(scope="module")
def threaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "endless"
    # Few positions: no answer takes long.
    model = make_endless(folder, max_position_embeddings=64)
    with cluster_thread(model) as started:
        yield started


@pytest.fixture(scope="module")
def served(threaded):
    url = f"http://{threaded.cluster.router.http_address}"
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_is_answered_otherwise_than_the_document_says(served, path, method, mode):
    @given(case=served[path][method].as_strategy(generation_mode=mode))
    @GENERATED
    def answered(case):
        case.call_and_validate(checks=CHECKS)

    try:
        answered()
    except Unsatisfiable:
        pytest.skip("there is nothing to be wrong about")


def test_everybody_is_well_afterwards(threaded):
    router = threaded.cluster.router
    reply = httpx2.post(
        f"http://{router.http_address}/v1/completions", json={"prompt": "a", "max_tokens": 2}
    )
    assert reply.status_code == 200
    assert len(router.fleet.dispatcher) == 0
    assert router.fleet.connected("prefill") == router.fleet.connected("decode") == 1


def cases_of(operation, mode) -> list[schemathesis.Case]:
    cases: list[schemathesis.Case] = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @GENERATED
    def collected(case):
        cases.append(case)

    with contextlib.suppress(Unsatisfiable):
        collected()
    return cases


def lines_of_calls() -> Iterator[str]:
    """What is wrong for every route; what is right where nothing is to be computed for it."""
    schema = schemathesis.openapi.from_dict(document())
    for path, method in OPERATIONS:
        mode = GenerationMode.NEGATIVE if method == "post" else GenerationMode.POSITIVE
        for case in cases_of(schema[path][method], mode):
            parts = case.as_transport_kwargs(base_url="http://router")
            call = requests.Request(**{**parts, "cookies": None}).prepare()
            body = call.body.encode() if isinstance(call.body, str) else call.body or b""
            yield written(call.method, call.path_url, call.headers, body)


async def test_streams_beside_them_get_their_tokens_in_time(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    lines = list(lines_of_calls())
    random.Random(1).shuffle(lines)
    calls = tmp_path / "calls.jsonl"
    calls.write_text("\n".join(lines))
    model = make_slow(tmp_path / "slow", max_position_embeddings=512)
    async with local_cluster(model, worker={"kv_bytes": 64 << 20}) as cluster:
        fleet = cluster.router.fleet
        workers = set(fleet._connected)
        sender = CallSender("http", cluster.router.http_address, str(calls))
        async with cluster.client() as client, Bystanders(client).running() as bystanders:
            count = max(CALLS_MIN, len(lines))
            statuses, wrong = await sent_in_turns(bystanders, sender, count, PER_S)
        await asyncio.to_thread(sender.close)
        print(bystanders.gaps, dict(statuses))
        assert wrong == []
        assert set(fleet._connected) == workers, "a worker was lost"
        await until(lambda: not len(fleet.dispatcher) and cluster.all_free(), within_s=QUIET_S)
        fleet.dispatcher.check()
    assert {"200", "400"} <= statuses.keys()
    assert caplog.messages == []
    bystanders.gaps.check(P99_RATIO_MAX)
