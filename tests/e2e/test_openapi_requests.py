"""Requests made up from the OpenAPI document, right and wrong ones, against a real cluster.

KVRELAY_GENERATED_REQUESTS is the number for each route, once of right and once of wrong ones.
"""

import os

import httpx2
import pytest
import schemathesis
from cluster_thread import cluster_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiny_models import make_endless

from router.http.document import document

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

EXAMPLES = int(os.environ.get("KVRELAY_GENERATED_REQUESTS", "150"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
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
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
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
