"""What is settled before a route is looked at: keys and ids."""

import pytest
from http_router import http_router, says

from router.callers import Caller, Callers
from router.http.gate import OPEN_PATHS, PATHS, route_of
from router.refusals import Reason, Refusal


class Keyed(Callers):
    def identify(self, authorization: str | None) -> Caller:
        if authorization != "Bearer right":
            raise Refusal(Reason.UNAUTHENTICATED, "the API key is missing or wrong")
        return Caller("somebody", "salt")


@pytest.mark.parametrize("path", [*sorted(PATHS), "/v1/models/tiny", "/nowhere", "/v1"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
async def test_every_path_but_two_needs_a_key(path, headers):
    async with http_router(callers=Keyed()) as router:
        for method in ("GET", "POST", "DELETE"):
            reply = await router.client.request(method, path, headers=headers)
            if path in OPEN_PATHS:
                assert reply.status_code == (200 if method == "GET" else 405)
                continue
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        refused = b'kvrelay_requests_total{outcome="unauthenticated",protocol="http"}'
        assert (refused in router.fleet.metrics.text()) == (path not in OPEN_PATHS)


async def test_who_calls_salts_the_prefixes():
    async with http_router(lambda _: says("a"), callers=Keyed()) as router:
        router.client.headers["authorization"] = "Bearer right"
        assert (await router.complete(n=2)).status_code == 200
        for _ in range(2):
            request, _ = router.fleet.asked.get_nowait()
            assert request.tenant == "salt"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("mine-1", True), ("a" * 128, True), ("a" * 129, False), ("two words", False), ("", False)],
)
async def test_the_clients_own_id_is_kept_where_it_is_fit(given, kept):
    async with http_router(lambda _: says("a")) as router:
        reply = await router.client.post(
            "/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": given}
        )
        request, _ = router.fleet.asked.get_nowait()
        assert (request.request_id == given) == kept
        assert reply.headers["x-request-id"] == request.request_id


def test_names_of_routes_in_the_metrics_are_few():
    assert route_of("/v1/completions") == "/v1/completions"
    assert route_of("/v1/models/a/b") == "/v1/models/{model}"
    assert route_of("/anything") == route_of("/else") == "other"
