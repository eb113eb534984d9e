"""The OpenAPI document says what is there."""

from http_router import http_router

from router.http.document import document
from router.http.errors import KINDS
from router.http.gate import MODEL_PATH, PATHS
from router.refusals import Reason


def test_every_route_and_no_other_is_in_it():
    assert document()["paths"].keys() == PATHS | {f"{MODEL_PATH}{{model}}"}


def test_every_refusal_has_a_status_that_is_in_it():
    assert KINDS.keys() == set(Reason)
    statuses = {str(kind.status.value) for kind in KINDS.values()}
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = document()["paths"][path]["post"]["responses"]
        assert responses.keys() >= statuses - {"403"} | {
            "200",
            "405",
            "408",
            "413",
            "415",
            "431",
            "500",
        }


async def test_it_is_served():
    async with http_router() as router:
        assert (await router.client.get("/openapi.json")).json() == document()
