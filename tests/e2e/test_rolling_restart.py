"""A rolling restart of two workers of each role, with two routers, under long answers.

The short form, with one worker of each role, is in test_supervision.py.
"""

import itertools
import signal
import threading
from pathlib import Path

import pytest
from serve_process import ANSWER_S, SAMPLED, Server, serving, soon
from tiny_models import make_endless

from kvrelay.client import Client, KvrelayError

TOKENS = 2_000
STREAMS = 8
PROMPTS = ("hello", "a longer prompt, of some words", "x")
WHOLE_S = 600.0


def answer(address: str, prompt: str) -> tuple[int, ...]:
    with Client(address, timeout_s=ANSWER_S) as client:
        return client.generate(prompt, max_tokens=TOKENS, **SAMPLED).result().token_ids


class Load:
    """So many clients that ask again and again, each at a router and for a prompt of its own."""

    def __init__(self, addresses: tuple[str, str], expected: dict[str, tuple[int, ...]]) -> None:
        self.answered = 0
        self.wrong: list[object] = []
        self._expected = expected
        self._stopping = threading.Event()
        asked = itertools.cycle(itertools.product(addresses, PROMPTS))
        self._threads = [
            threading.Thread(target=self._ask, args=next(asked)) for _ in range(STREAMS)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(ANSWER_S)
        assert not any(thread.is_alive() for thread in self._threads)

    def _ask(self, address: str, prompt: str) -> None:
        while not self._stopping.is_set():
            try:
                if answer(address, prompt) != self._expected[prompt]:
                    self.wrong.append(f"another answer to {prompt!r}")
                self.answered += 1
            except KvrelayError as error:
                self.wrong.append(error)


def restart(server: Server) -> None:
    said = len(server.stderr)
    before = server.workers()
    server.process.send_signal(signal.SIGUSR1)
    done = "all workers have been restarted"
    assert soon(lambda: done in server.stderr[said:], WHOLE_S), server.stderr
    after = server.workers()
    assert len(after) == len(before) == 4
    assert not before & after
    assert "it will be replaced" not in server.stderr[said:]


@pytest.mark.slow
@pytest.mark.timeout(3 * WHOLE_S)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_all_workers_are_restarted_and_every_long_answer_is_right(tmp_path: Path, transport):
    model = make_endless(tmp_path / "endless", max_position_embeddings=1 << 16)
    pools = ("--prefill", "2", "--decode", "2", "--routers", "2", "--transport", transport)
    # Too little for some to finish where they are: they go on elsewhere.
    with serving(model, *pools, "--drain-s", "1") as server:
        [(second, _)] = server.further_routers(1)
        expected = {prompt: answer(server.address, prompt) for prompt in PROMPTS}
        assert all(len(ids) == TOKENS for ids in expected.values())
        with Load((server.address, second), expected) as load:
            assert soon(lambda: load.answered >= STREAMS)
            restart(server)
            restart(server)
            enough = load.answered + STREAMS  # after the restart, too
            assert soon(lambda: load.answered >= enough)
        assert load.wrong == []
