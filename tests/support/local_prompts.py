"""Prompts that a decode worker is to compute itself, as a router that the test plays asks for them
(session_with in router_double.py)."""

from collections.abc import Sequence
from typing import Any

from router_double import Session

from kvrelay.engine.step_cost import StepCost
from kvrelay.kv.prefix import PrefixChain, chain_root, join_hashes
from kvrelay.wire import worker_pb2


def ask(
    session: Session, service: Any, key: int, prompt: Sequence[int], **sampling: Any
) -> worker_pb2.Reserve:
    """Sends a Reserve with prefill_here; sampling: fields of the wire's."""
    reserve = local_reserve(service, key, prompt, **sampling)
    session.send(reserve=reserve)
    return reserve


def local_reserve(
    service: Any, key: int, prompt: Sequence[int], **sampling: Any
) -> worker_pb2.Reserve:
    layout = service._layout
    chain = PrefixChain(
        chain_root(layout.model_fingerprint, layout.block_size, ""), layout.block_size
    )
    chain.extend(prompt)
    return worker_pb2.Reserve(
        key=key,
        request_id=f"request-{key}",
        attempt=1,
        prompt_tokens=len(prompt),
        sampling=worker_pb2.Sampling(**{"max_tokens": 8, "top_p": 1.0, **sampling}),
        block_hashes=join_hashes(chain.hashes),
        hash_root=chain.root,
        tail_token_ids=chain.tail,
        prompt_token_ids=prompt,
        prefill_here=True,
    )


def outputs(session: Session, key: int) -> list[worker_pb2.SequenceOutput]:
    steps = [e.step for e in session.events if e.WhichOneof("event") == "step"]
    return [output for step in steps for output in step.outputs if output.key == key]


def failure(session: Session, key: int) -> worker_pb2.Failed | None:
    failed = [e.failed for e in session.events if e.WhichOneof("event") == "failed"]
    return next((message for message in failed if message.key == key), None)


async def answer(session: Session, key: int) -> tuple[int, ...]:
    """All its tokens; AssertionError when it fails, or when their offsets have a gap."""

    def ended() -> bool:
        return failure(session, key) is not None or any(o.ending for o in outputs(session, key))

    await session.until(ended, within_s=120.0)
    assert failure(session, key) is None, failure(session, key)
    tokens: list[int] = []
    for output in outputs(session, key):
        assert output.offset == len(tokens)
        tokens.extend(output.token_ids)
    return tuple(tokens)


async def refusal(session: Session, key: int) -> worker_pb2.Failed:
    await session.until(lambda: failure(session, key) is not None)
    failed = failure(session, key)
    assert failed is not None
    return failed


class FixedFit:
    """In place of a StepFit: what a step leaves for prompts, one figure after another."""

    def __init__(self, *tokens: int) -> None:
        self.cost = StepCost()
        self._tokens = tokens
        self._asked = 0

    def measured(self, prompt_tokens: int, sequences: int, step_ms: float) -> None:
        """Changes nothing."""

    def prompt_tokens_within(self, step_ms: float, sequences: int) -> int:
        self._asked += 1
        return self._tokens[self._asked % len(self._tokens)]
