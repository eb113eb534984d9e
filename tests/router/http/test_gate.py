"""What is settled before a route is looked at: keys and ids."""

import asyncio

import pytest
from http_router import http_router, says

from router.callers import Caller, Callers
from router.http.gate import OPEN_PATHS, PATHS, route_of
from router.refusals import Reason, Refusal
from router.request import Ending


class Keyed(Callers):
    def identify(self, authorization: str | None) -> Caller:
        if authorization not in ("Bearer right", "Bearer watcher"):
            raise Refusal(Reason.UNAUTHENTICATED, "the API key is missing or wrong")
        return Caller("somebody", "salt", metrics=authorization == "Bearer watcher")


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


@pytest.mark.parametrize("path", [*sorted(PATHS), "/v1/models/", "/v1/models/tiny"])
async def test_a_line_break_makes_another_path(path):
    async with http_router(callers=Keyed()) as router:
        reply = await router.client.get(f"{path}%0A")
        assert reply.status_code == 401
        router.client.headers["authorization"] = "Bearer watcher"
        reply = await router.client.get(f"{path}%0A")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_url")


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
        assert request.request_id != given
        assert reply.headers["x-request-id"] == (given if kept else request.request_id)


async def test_two_calls_with_one_id_run_side_by_side():
    async with http_router() as router:
        headers, body = {"x-request-id": "trace-1"}, {"prompt": "hi"}
        calls = [
            asyncio.create_task(router.client.post("/v1/completions", json=body, headers=headers))
            for _ in range(2)
        ]
        both = [await router.fleet.asked.get() for _ in calls]
        assert both[0][0].name != both[1][0].name
        for _, answer in both:
            answer.put(Ending.LENGTH)
        for reply in await asyncio.gather(*calls):
            assert (reply.status_code, reply.headers["x-request-id"]) == (200, "trace-1")


async def test_the_metrics_need_a_key_that_may_read_them():
    async with http_router(callers=Keyed()) as router:
        for key, status in (("right", 403), ("watcher", 200)):
            headers = {"authorization": f"Bearer {key}"}
            reply = await router.client.get("/metrics", headers=headers)
            assert reply.status_code == status
            if status == 403:
                error = reply.json()["error"]
                assert error["code"] == "forbidden"
                assert "metrics = true" in error["message"]
                assert (await router.client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_key_cannot_overtake_others_by_itself():
    async with http_router(lambda _: says("a"), callers=Keyed()) as router:
        router.client.headers["authorization"] = "Bearer right"
        reply = await router.complete(priority=-1)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["param"] == "priority"
        assert error["message"] == "priority: -1, this API key may ask for 0 (first) to 100"
        assert (await router.complete(priority=0)).status_code == 200
    async with http_router(lambda _: says("a")) as router:
        assert (await router.complete(priority=-100)).status_code == 200


def test_names_of_routes_in_the_metrics_are_few():
    assert route_of("/v1/completions") == "/v1/completions"
    assert route_of("/v1/models/a/b") == "/v1/models/{model}"
    assert route_of("/anything") == route_of("/else") == "other"
