"""Requests that another router has begun: found at workers, gone on with, each by one alone."""

from pathlib import Path
from typing import Any

import pytest

from kvrelay.config import RouterConfig
from kvrelay.wire import transfer_pb2
from kvrelay.wire import worker_pb2 as pb
from router.admission import Sampling
from router.commands import (
    Command,
    Deliver,
    Failed,
    Finished,
    NotKept,
    NotKeptTrouble,
    Resumed,
    TakenOverTrouble,
    ToDecode,
)
from router.dispatcher import Dispatcher
from router.request import Ending, Request, RequestState, Times
from router.resumption import Resumption

EOS = 999
TENANT = "somebody"
NONCE = 2**63 + 1
SAMPLING = Sampling(
    temperature=0.5,
    top_k=4,
    top_p=0.75,
    seed=2**63,
    max_tokens=10,
    stop=("stop", "here"),
    eos_token_ids=(EOS, 7),
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    min_tokens=3,
)


class Bench:
    """A dispatcher with decode workers, and what it told to them and to clients."""

    def __init__(self, *workers: str) -> None:
        self.dispatcher = Dispatcher(
            RouterConfig(
                model_path=Path("none"),
                model_name="tiny",
                cluster_key="k" * 16,
                control_socket=Path("none"),
                resume_ms=2000,
            )
        )
        self.sent: list[ToDecode] = []
        self.told: list[Command] = []
        for worker in workers or ("d1", "d2", "d3"):
            layout = transfer_pb2.KvLayout(model_fingerprint="m", block_size=4)
            info = pb.WorkerInfo(
                instance_id=worker, layout=layout, blocks_total=100, max_model_tokens=400
            )
            self.dispatcher.decode_up(worker, info)

    def take(self, commands: list[Command]) -> None:
        for command in commands:
            (self.sent if isinstance(command, ToDecode) else self.told).append(command)
        self.dispatcher.check()

    def event(self, worker: str, **event: Any) -> None:
        load = pb.DecodeLoad(blocks_free=100)
        message = pb.DecodeEvent(load=load, **event)
        self.take(self.dispatcher.on_decode_event(worker, message, 5.0))

    def resume(
        self, kept_at: str = "", next_offset: int = 0, now: float = 0.0, nonce: int = NONCE
    ) -> Resumption:
        wish = Resumption("r1", TENANT, kept_at, nonce, next_offset, now)
        self.take(self.dispatcher.resume(wish))
        return wish

    def asked(self) -> dict[str, pb.Adopt]:
        """The newest Adopt of each worker."""
        return {c.worker_id: c.command.adopt for c in self.sent if c.command.HasField("adopt")}

    def told_to(self, kind: str) -> list[tuple[str, Any]]:
        return [
            (c.worker_id, getattr(c.command, kind)) for c in self.sent if c.command.HasField(kind)
        ]

    def adopted(self, worker: str, tokens: list[int], ending: int = 0, **more: Any) -> None:
        event = pb.Adopted(
            key=self.asked()[worker].key,
            reserve=reserve(**more),
            token_ids=tokens,
            ending=pb.Ending.ValueType(ending),
        )
        self.event(worker, adopted=event)

    def refused(self, worker: str) -> None:
        key = self.asked()[worker].key
        self.event(worker, failed=pb.Failed(key=key, code=pb.FAILURE_CODE_NOT_KEPT))

    def step(self, request: Request, offset: int, *tokens: int, ending: int = 0) -> None:
        output = pb.SequenceOutput(
            key=request.key, offset=offset, token_ids=tokens, ending=pb.Ending.ValueType(ending)
        )
        self.event(request.decode_id, step=pb.StepOutput(outputs=[output]))

    def running(self, **wish: Any) -> Request:
        """Resumed from d2, with tokens 10 and 11 of its own attempt after 8 and 9."""
        self.resume("d2", **wish)
        self.adopted("d2", [10, 11])
        [resumed] = [c for c in self.told if isinstance(c, Resumed)]
        return resumed.request


def reserve(answered: int = 2) -> pb.Reserve:
    """As another router sends it: prompt 1 to 5, then answered tokens, 8 and on."""
    dispatcher = Bench("other").dispatcher
    request = Request("r1", [1, 2, 3, 4, 5], SAMPLING, Times(0.0), tenant=TENANT, priority=-4)
    request.nonce = NONCE
    request.answer = list(range(8, 8 + answered))
    [command] = dispatcher.submit(request)
    return command.command.reserve


def test_all_decode_workers_are_asked_when_the_client_does_not_know_which():
    bench = Bench()
    bench.resume()
    asked = bench.asked()
    assert set(asked) == {"d1", "d2", "d3"}
    assert len({adopt.key for adopt in asked.values()}) == 3
    named = {(adopt.tenant, adopt.request_id, adopt.nonce) for adopt in asked.values()}
    assert named == {(TENANT, "r1", NONCE)}


def test_only_the_one_that_the_client_was_told_is_asked():
    bench = Bench()
    bench.resume("d2")
    assert set(bench.asked()) == {"d2"}


@pytest.mark.parametrize("answered", [0, 2, 3])
def test_an_adopted_request_is_what_it_was(answered):
    bench = Bench()
    wish = bench.resume("d1", next_offset=1)
    bench.adopted("d1", [20, 21], answered=answered)
    [told] = bench.told
    assert isinstance(told, Resumed)
    request = told.request
    assert (told.wish, request.request_id, request.tenant) == (wish, "r1", TENANT)
    assert request.prompt == [1, 2, 3, 4, 5]
    assert request.answer == [*range(8, 8 + answered), 20, 21]
    assert request.sampling == SAMPLING
    assert (request.priority, request.nonce) == (-4, NONCE)
    assert request.state is RequestState.DECODING
    assert request.decode_id == "d1"


def test_it_goes_on_and_its_decode_worker_may_forget_it_when_its_client_has_it_all():
    bench = Bench()
    request = bench.running()
    bench.told.clear()
    bench.step(request, 2, 12)
    bench.step(request, 3, EOS, ending=1)
    assert bench.told == [
        Deliver(request, 4, [12]),
        Deliver(request, 5, [EOS]),
        Finished(request, Ending.EOS),
    ]
    assert bench.told_to("acknowledge") == []
    bench.take(bench.dispatcher.let_go(request))
    bench.take(bench.dispatcher.let_go(request))
    [(worker, acknowledge)] = bench.told_to("acknowledge")
    assert (worker, list(acknowledge.keys)) == ("d2", [bench.asked()["d2"].key])
    assert bench.told_to("cancel") == []


def test_a_whole_answer_is_finished_at_once():
    bench = Bench()
    bench.resume("d2")
    bench.adopted("d2", [10, EOS], ending=1)
    resumed, finished = bench.told
    assert (resumed.request, finished.request) == (finished.request, resumed.request)
    assert finished.ending is Ending.EOS
    assert len(bench.dispatcher) == 0
    bench.take(bench.dispatcher.let_go(resumed.request))
    assert len(bench.told_to("acknowledge")) == 1


def test_its_new_decode_worker_dies_too_and_it_is_placed_again():
    bench = Bench()
    request = bench.running()
    bench.take(bench.dispatcher.worker_down("d2", 10.0))
    bench.take(bench.dispatcher.pump(10.0))
    [(worker, again)] = bench.told_to("reserve")
    assert worker in ("d1", "d3")
    assert list(again.prompt_token_ids) == [1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert (again.answered, again.min_tokens, again.sampling.max_tokens) == (4, 3, 6)
    assert request.state is RequestState.RESERVING


def test_many_that_lose_their_second_worker_too_are_all_placed_again():
    bench = Bench("d1", "d2")
    for name in ("one", "other"):
        wish = Resumption(name, TENANT, "d1", 0, 0, 0.0)
        bench.take(bench.dispatcher.resume(wish))
        asked = reserve()
        asked.request_id = name
        key = next(iter(wish.asked))
        bench.event("d1", adopted=pb.Adopted(key=key, reserve=asked, token_ids=[3]))
    bench.sent.clear()
    bench.take(bench.dispatcher.worker_down("d1", 1.0))
    bench.take(bench.dispatcher.pump(1.0))
    placed = [sent.command.reserve.request_id for sent in bench.sent]
    assert (placed, bench.dispatcher.queued) == (["one", "other"], 0)
    bench.dispatcher.check()


def test_its_client_goes_away():
    bench = Bench()
    request = bench.running()
    bench.take(bench.dispatcher.let_go(request))
    assert [(w, c.key) for w, c in bench.told_to("cancel")] == [("d2", request.key)]
    assert len(bench.dispatcher) == 0


# ---- who has it


def test_the_first_that_has_it_wins_and_the_others_let_go():
    bench = Bench()
    bench.resume()
    bench.refused("d1")
    bench.adopted("d3", [10])
    bench.adopted("d2", [10])
    [resumed] = bench.told
    assert resumed.request.decode_id == "d3"
    assert [(w, c.key) for w, c in bench.told_to("cancel")] == [("d2", bench.asked()["d2"].key)]


def not_kept(bench: Bench) -> str:
    [told] = bench.told
    assert isinstance(told, NotKept)
    assert isinstance(told.trouble, NotKeptTrouble)
    assert len(bench.dispatcher) == 0
    return str(told.trouble)


def test_nobody_has_it():
    bench = Bench()
    bench.resume()
    for worker in ("d1", "d2"):
        bench.refused(worker)
        assert bench.told == []
    bench.refused("d3")
    assert not_kept(bench) == (
        "no worker keeps request 'r1': ask again, with the seed it was accepted with"
    )


def test_the_one_that_had_it_is_not_connected():
    bench = Bench()
    bench.resume("d9")
    assert "no worker keeps" in not_kept(bench)
    assert bench.sent == []


def test_the_ones_that_were_asked_die():
    bench = Bench()
    bench.resume()
    bench.refused("d1")
    bench.take(bench.dispatcher.worker_down("d2", 1.0))
    assert bench.told == []
    bench.take(bench.dispatcher.worker_down("d3", 1.0))
    assert "no worker keeps" in not_kept(bench)


def test_one_that_answers_too_late_lets_go():
    bench = Bench("d1")
    bench.resume()
    bench.take(bench.dispatcher.expire(2000.0))
    assert bench.told == []
    bench.take(bench.dispatcher.expire(2001.0))
    assert "no worker keeps" in not_kept(bench)
    bench.adopted("d1", [10])
    assert [w for w, _ in bench.told_to("cancel")] == ["d1"]
    assert len(bench.dispatcher) == 0


def test_a_client_that_does_not_wait_leaves_nothing():
    bench = Bench("d1", "d2")
    wish = bench.resume()
    bench.refused("d1")
    bench.dispatcher.withdraw(wish)
    bench.dispatcher.withdraw(wish)
    bench.adopted("d2", [10])
    assert [w for w, _ in bench.told_to("cancel")] == ["d2"]
    assert (bench.told, len(bench.dispatcher)) == ([], 0)


def test_a_client_that_has_more_than_anybody_is_told_so():
    bench = Bench()
    bench.resume("d2", next_offset=5)
    bench.adopted("d2", [10, 11])
    assert "only 4 tokens of request 'r1' are known here" in not_kept(bench)
    assert [w for w, _ in bench.told_to("cancel")] == ["d2"]


def test_a_worker_that_knows_less_than_the_client_does_not_keep_it_from_one_that_knows_more():
    bench = Bench()
    bench.resume(next_offset=5)
    bench.refused("d1")
    bench.adopted("d2", [10, 11])
    assert bench.told == []
    assert [(w, c.key) for w, c in bench.told_to("cancel")] == [("d2", bench.asked()["d2"].key)]
    bench.adopted("d3", [10, 11, 12])
    [resumed] = bench.told
    assert (resumed.request.decode_id, len(bench.told_to("cancel"))) == ("d3", 1)


def test_all_workers_know_less_than_the_client():
    bench = Bench()
    bench.resume(next_offset=5)
    bench.adopted("d3", [10, 11])
    bench.adopted("d2", [10])
    bench.refused("d1")
    assert "only 4 tokens of request 'r1' are known here" in not_kept(bench)
    assert [w for w, _ in bench.told_to("cancel")] == ["d3", "d2"]


# ---- who takes over


def test_a_request_that_runs_here_is_not_looked_for():
    bench = Bench()
    request = bench.running()
    bench.told.clear()
    wish = bench.resume(next_offset=4)
    assert bench.told == [Resumed(wish, request)]
    assert set(bench.asked()) == {"d2"}  # from before
    bench.told.clear()
    bench.resume(next_offset=5)
    [told] = bench.told
    assert isinstance(told, NotKept)
    assert len(bench.dispatcher) == 1


def test_of_two_that_look_for_it_the_later_one_has_it():
    bench = Bench("d1")
    bench.resume()
    first_key = bench.asked()["d1"].key
    second = bench.resume()
    first = pb.Adopted(key=first_key, reserve=reserve(), token_ids=[10])
    bench.event("d1", adopted=first)
    [resumed] = bench.told
    taken = pb.Failed(key=first_key, code=pb.FAILURE_CODE_TAKEN_OVER, message="taken")
    bench.event("d1", failed=taken)
    bench.adopted("d1", [10])
    _, failed, last = bench.told
    assert isinstance(failed, Failed)
    assert failed.request is resumed.request
    assert isinstance(failed.trouble, TakenOverTrouble)
    assert last.wish is second
    assert bench.told_to("cancel") == bench.told_to("reserve") == []


def test_a_request_that_another_router_took_over_ends_and_is_not_placed_again():
    bench = Bench()
    request = bench.running()
    bench.told.clear()
    taken = pb.Failed(key=request.key, code=pb.FAILURE_CODE_TAKEN_OVER, message="taken")
    bench.event("d2", failed=taken)
    [failed] = bench.told
    assert isinstance(failed.trouble, TakenOverTrouble)
    assert bench.told_to("cancel") == bench.told_to("reserve") == []
    assert len(bench.dispatcher) == 0
    bench.step(request, 2, 12)
    assert len(bench.told) == 1


def test_asked_again_here_while_it_was_looked_for():
    bench = Bench("d1")
    wish = bench.resume()
    request = Request("r1", [1, 2, 3, 4, 5], SAMPLING, Times(0.0), tenant=TENANT, nonce=NONCE)
    bench.take(bench.dispatcher.submit(request))
    bench.adopted("d1", [10])
    assert bench.told == [Resumed(wish, request)]
    assert [c.key for _, c in bench.told_to("cancel")] == [bench.asked()["d1"].key]


@pytest.mark.parametrize("looked_for", [False, True])
def test_another_request_of_its_name_that_runs_here_is_left_alone(looked_for):
    bench = Bench("d1")
    if looked_for:
        bench.resume()
    other = Request("r1", [9, 9], SAMPLING, Times(0.0), tenant=TENANT, nonce=5)
    bench.take(bench.dispatcher.submit(other))
    if looked_for:
        bench.adopted("d1", [10])
        assert [c.key for _, c in bench.told_to("cancel")] == [bench.asked()["d1"].key]
    else:
        bench.resume()
    [told] = bench.told
    assert isinstance(told, NotKept)
    assert "another request 'r1' runs here" in str(told.trouble)
    assert other.state is RequestState.RESERVING
