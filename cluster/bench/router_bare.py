"""The bare server of `kvrelay bench router`: gRPC's own cost, in the messages that a router writes.

Started by router_processes.py as `python -m cluster.bench.router_bare`. Says where it listens. It
has no workers, no text and no state of a request. Each line of stdin is a command:

  {"do": "pace", "step_ms": X}   a message to every stream each X ms; 0: none but the first
  {"do": "flat-out"}             messages to every stream, one after another
"""

import asyncio
import json
import sys
import time
from typing import Any

from cluster.bench.router_clock import stamp
from kvrelay.rpc import make_server
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire import inference_pb2_grpc


class Bare(inference_pb2_grpc.InferenceServicer):
    """Every answer begins at once, goes on at the pace and ends with its max_tokens."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.flat_out = False
        self.paced = asyncio.Event()
        self._turn = asyncio.Event()  # set, and replaced, at each step
        self._token = stamp()  # of the newest step

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        await context.write(pb.GenerateResponse(accepted=pb.Accepted(request_id="bare")))
        await context.write(_message(0, stamp()))
        for offset in range(1, request.sampling.max_tokens):
            if not self.flat_out:
                await self._turn.wait()  # a stream that is behind has missed a step
            await context.write(_message(offset, stamp() if self.flat_out else self._token))
        finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH)
        await context.write(pb.GenerateResponse(finished=finished))

    def wake(self) -> None:
        self._token = stamp()
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    async def run(self) -> None:
        while True:
            await self.paced.wait()
            due = time.monotonic() + self.step_s
            while self.paced.is_set():
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due = max(due + self.step_s, time.monotonic() - self.step_s)
                self.wake()


def _message(offset: int, token: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(offset=offset, token_ids=[token], text="abc"))


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    bare = Bare()
    stepping = asyncio.create_task(bare.run())
    server = make_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(bare, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"grpc=127.0.0.1:{port}", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        bare.flat_out = command["do"] == "flat-out"
        bare.step_s = command.get("step_ms", 0.0) / 1000
        (bare.paced.set if bare.step_s else bare.paced.clear)()
        if bare.flat_out:
            bare.wake()
        print("{}", flush=True)
    stepping.cancel()
    await server.stop(grace=None)


if __name__ == "__main__":
    asyncio.run(_serve())
