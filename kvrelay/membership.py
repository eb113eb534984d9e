"""How a router and a worker prove to each other that they hold the cluster's key, unseen.

Called by router/fleet.py (`prove`) and the workers' services (`MembershipDoor.admit`). It takes
two calls of the session's method. The first carries the router's nonce; the worker refuses it with
a nonce of its own and a proof over both. The router checks the proof, and shows its own in the
second call, which is the session. A proof also covers the worker's address: nobody can pass on to
one worker what a router said to another.
"""

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import grpc

_NONCE, _CHALLENGE, _PROOF = "kvrelay-nonce", "kvrelay-challenge", "kvrelay-proof"
_NONCE_CHARS = 64
_VERSION = "kvrelay membership 1"
CHALLENGES_MAX = 1024  # given and not answered; the oldest makes room


def new_cluster_key() -> str:
    return secrets.token_hex(32)


class NotAMemberError(ValueError):
    """The worker does not hold the cluster's key, or is not the one that was dialed."""


def _proof(cluster_key: str, who: str, address: str, nonce: str, challenge: str) -> str:
    message = "\0".join((_VERSION, who, address, nonce, challenge))
    return hmac.new(cluster_key.encode(), message.encode(), "sha256").hexdigest()


class MembershipDoor:
    """The worker's side. `address` is where routers dial it."""

    def __init__(self, cluster_key: str, address: str) -> None:
        self._key = cluster_key
        self._address = address
        self._challenges: OrderedDict[str, str] = OrderedDict()  # the router's nonce for each

    async def admit(self, context: Any) -> None:
        """Returns when the caller holds the cluster's key; else ends the call with
        UNAUTHENTICATED, and with a challenge for a caller that asks for one."""
        given = dict(context.invocation_metadata() or ())
        challenge, proof = str(given.get(_CHALLENGE, "")), str(given.get(_PROOF, ""))
        if challenge or proof:
            nonce = self._challenges.pop(challenge, None)  # good once
            if nonce is not None and self._is_routers(proof, nonce, challenge):
                return
            await _refuse(context, "the proof of the cluster key is wrong")
        nonce = str(given.get(_NONCE, ""))
        if len(nonce) != _NONCE_CHARS:
            await _refuse(context, "a proof of the cluster key is missing")
        challenge = self._challenge(nonce)
        proof = _proof(self._key, "worker", self._address, nonce, challenge)
        await _refuse(context, "prove it", ((_CHALLENGE, challenge), (_PROOF, proof)))

    def _is_routers(self, proof: str, nonce: str, challenge: str) -> bool:
        right = _proof(self._key, "router", self._address, nonce, challenge)
        return hmac.compare_digest(proof.encode(), right.encode())

    def _challenge(self, nonce: str) -> str:
        challenge = secrets.token_hex(_NONCE_CHARS // 2)
        self._challenges[challenge] = nonce
        if len(self._challenges) > CHALLENGES_MAX:
            self._challenges.popitem(last=False)
        return challenge


async def prove(
    session: Callable[..., Any], address: str, cluster_key: str, timeout_s: float
) -> list[tuple[str, str]]:
    """The metadata with which the worker at `address` lets the session begin, once it has proven
    that it is a member itself. session: the stub's method.

    Raises:
        NotAMemberError: it has not.
        grpc.aio.AioRpcError: it cannot be reached, or has not answered within timeout_s.
    """
    nonce = secrets.token_hex(_NONCE_CHARS // 2)
    call = session(metadata=[(_NONCE, nonce)], timeout=timeout_s)
    answer: dict[str, Any] = {}
    try:
        async for _ in call:
            break  # it lets anybody in: no member does
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        answer = dict(error.trailing_metadata() or ())
    finally:
        call.cancel()
    challenge, proof = str(answer.get(_CHALLENGE, "")), str(answer.get(_PROOF, ""))
    right = _proof(cluster_key, "worker", address, nonce, challenge)
    if len(challenge) != _NONCE_CHARS or not hmac.compare_digest(proof.encode(), right.encode()):
        raise NotAMemberError("the worker does not hold the cluster's key")
    own = _proof(cluster_key, "router", address, nonce, challenge)
    return [(_CHALLENGE, challenge), (_PROOF, own)]


async def _refuse(context: Any, message: str, trailing: tuple[tuple[str, str], ...] = ()) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message, trailing)
