"""Generated calls of the gRPC service, hostile ones for the most part, beside streams that are not.

KVRELAY_FUZZ_REQUESTS is their number. Whatever they are, each gets a status that the contract has,
nobody dies, every block comes back, and the streams beside them get their tokens, in time: the p99
of the gaps between tokens is at most 1.2 times that of windows without hostile calls, which take
turns with those that have them; the median window of either kind is what counts. What is compared
is the cost of refusing: calls that a window's workers had to do with, which ask for four tokens for
the most part, come again in the window after it. Calls come 50 a second, from a process of their
own; router, workers and bystanders share this one. A machine on which windows without hostile calls
differ as much cannot tell.
"""

import asyncio
import logging
import os

import pytest
from bystanders import Bystanders, sent_in_turns
from call_sender import CallSender
from local_cluster import local_cluster
from tiny_models import make_slow
from waiting import until

from router.keys import new_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

CALLS = int(os.environ.get("KVRELAY_FUZZ_REQUESTS", "2000"))
SEED = int(os.environ.get("KVRELAY_FUZZ_SEED", "1"))
PER_S = 50.0
P99_RATIO_MAX = 1.2
QUIET_S = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_slow(tmp_path_factory.mktemp("models") / "slow")


@pytest.fixture
def keys(tmp_path):
    """A key for the generated calls and one for the streams beside them, in a file."""
    made = {name: new_key(name) for name in ("stranger", "bystander")}
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(entry for _, entry in made.values()))
    return path, {name: key for name, (key, _) in made.items()}


@pytest.mark.parametrize("local_prefill", ["never", "auto"])
async def test_generated_calls_harm_nobody(model, keys, caplog, local_prefill):
    caplog.set_level(logging.ERROR)
    path, key_of = keys
    router = {"api_keys": path, "local_prefill": local_prefill}
    async with local_cluster(model, worker={"kv_bytes": 64 << 20}, router=router) as cluster:
        fleet = cluster.router.fleet
        workers = set(fleet._connected)
        sender = CallSender("grpc", cluster.router.address, str(SEED), key_of["stranger"])
        async with cluster.client(api_key=key_of["bystander"]) as client:
            async with Bystanders(client).running() as bystanders:
                statuses, wrong = await sent_in_turns(bystanders, sender, CALLS, PER_S)
            await asyncio.to_thread(sender.close)
            print(bystanders.gaps, dict(statuses))
            assert wrong == []
            assert set(fleet._connected) == workers, "a worker was lost"
            await until(lambda: not len(fleet.dispatcher) and cluster.all_free(), within_s=QUIET_S)
            fleet.dispatcher.check()
            assert (await client.generate("and then", max_tokens=2).result()).completion_tokens == 2
    assert sum(statuses.values()) == CALLS
    assert {"INVALID_ARGUMENT", "UNAUTHENTICATED", "OK", "CANCELLED"} <= statuses.keys()
    assert caplog.messages == []
    bystanders.gaps.check(P99_RATIO_MAX)
