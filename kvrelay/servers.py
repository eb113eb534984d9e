"""The servers that a client may ask: owns their addresses, channels, and which is asked first.

Made by both clients. They are alike: routers of one cluster, any of which can serve a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvrelay.credentials import authorization, channel_credentials
from kvrelay.peer import KvrelayError, Peer, checked_address
from kvrelay.wire.inference_pb2_grpc import InferenceStub

MESSAGE_BYTES_MAX = 32 * 2**20

_CHANNEL_OPTIONS = (
    # Above what servers take, so that the server's own refusal, which names its limit, is seen.
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A restarted server is found again within a second; gRPC would wait up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
    # One that takes connections and says nothing is given up; gRPC would wait for 20 s.
    ("grpc.min_reconnect_backoff_ms", 3000),
    # One that hangs in the middle of an answer is found within 2.5 s.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),  # or it is a minute, whatever the above says
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True)
class Server:
    peer: Peer
    channel: Any
    stub: Any


class Servers:
    """address: HOST:PORT, or several of them with commas between. Connects to none before it is
    asked something."""

    def __init__(
        self,
        address: str,
        timeout_s: float,
        api_key: str | None,
        certificates: Path | None,
        channels: Any,  # grpc or grpc.aio
    ) -> None:
        self.first = 0  # to be asked first: the one that has worked last
        self._metadata = authorization(api_key)
        addresses = [checked_address(each.strip()) for each in address.split(",")]
        shown = None if certificates is None else channel_credentials(certificates)
        self._all = []
        for each in addresses:
            if shown is None:
                channel = channels.insecure_channel(each, options=_CHANNEL_OPTIONS)
            else:
                channel = channels.secure_channel(each, shown, options=_CHANNEL_OPTIONS)
            self._all.append(Server(Peer(each, timeout_s), channel, InferenceStub(channel)))

    def __len__(self) -> int:
        return len(self._all)

    def in_turn(self) -> list[int]:
        """All of them, in the order in which to ask."""
        return [(self.first + more) % len(self._all) for more in range(len(self._all))]

    def peer(self, server: int) -> Peer:
        return self._all[server].peer

    @property
    def channels(self) -> list[Any]:
        return [server.channel for server in self._all]

    def call(self, server: int, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """The call, begun; it ends at the latest after timeout_s, or what is usual here."""
        asked = self._all[server]
        timeout_s = asked.peer.timeout_s if timeout_s is None else timeout_s
        call = getattr(asked.stub, method)
        try:
            return call(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError as error:  # the channel is closed
            raise KvrelayError(grpc.StatusCode.CANCELLED, "the client has been closed") from error
