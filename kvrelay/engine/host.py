"""A model with its pool on a thread of its own: what prefill and decode workers have in common.

The event loop of a worker answers peers at any moment, so the engine must not run on it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kvrelay.config import PROTOCOL_VERSION, WorkerConfig
from kvrelay.engine.cores import CoreBoard, open_board
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.runner import ModelRunner, UnsupportedModelError
from kvrelay.engine.sampling import sample
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.step import CancelFlag, Slice
from kvrelay.engine.step_cost import StepFit
from kvrelay.failpoints import Failpoints, Point
from kvrelay.kv.pool import KVPool, touch_pages
from kvrelay.wire import worker_pb2

log = logging.getLogger(__name__)

_Stepped = tuple[list[int | None], float]  # the new tokens, and what the step took, in ms

_BOARD = "cores"  # the file of the CoreBoard
_LOOKS = 10  # at a step within its time: what holds up the whole process counts as one at most


class EngineHangsError(Exception):
    """A step does not end. Its thread may still write: only the end of the process helps."""


class EngineHost:
    """Owns the model, the pool and the engine thread. Made by `load`.

    step_ms_max: a step that takes longer never ends.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: KVPool,
        thread: ThreadPoolExecutor,
        failpoints: Failpoints,
        step_ms_max: int,
        board: CoreBoard | None = None,
    ) -> None:
        self.pool = pool
        self.fit = StepFit()  # of the steps that were not cancelled
        self._runner = runner
        self._thread = thread
        self._failpoints = failpoints
        self._step_s_max = step_ms_max / 1000
        self._board = board
        self._hangs = False
        self._closed = threading.Event()
        self._touching = threading.Thread(
            target=touch_pages, args=[pool.bytes, self._closed], name="touch pages", daemon=True
        )
        self._touching.start()

    def info(self, instance_id: str, chunk_tokens: int) -> worker_pb2.WorkerInfo:
        """What a worker with this engine says of itself at the start of a session; chunk_tokens: of
        prompts in one step, at most."""
        layout = self.pool.layout
        held = self.pool.blocks * layout.block_size
        return worker_pb2.WorkerInfo(
            protocol_version=PROTOCOL_VERSION,
            instance_id=instance_id,
            layout=layout.to_wire(),
            blocks_total=self.pool.blocks,
            max_model_tokens=min(held, self._runner.context_limit or held),
            chunk_tokens=chunk_tokens,
        )

    def cost(self) -> worker_pb2.StepCost:
        """What a worker with this engine says of its steps, at any time."""
        cost = self.fit.cost
        return worker_pb2.StepCost(
            base_ms=cost.base_ms,
            ms_per_prompt_token=cost.ms_per_prompt_token,
            ms_per_sequence=cost.ms_per_sequence,
        )

    @classmethod
    async def load(cls, config: WorkerConfig, *, shared_pool: bool) -> "EngineHost":
        """Reads the weights and maps the pool.

        Raises:
            UnsupportedModelError: the model or the device cannot be used; one line.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, cls._load, config, shared_pool, thread)

    @classmethod
    def _load(
        cls, config: WorkerConfig, shared_pool: bool, thread: ThreadPoolExecutor
    ) -> "EngineHost":
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedModelError("--device cuda: torch finds no CUDA device here")
        # Where the weights are packed, the engine has threads of its own, and what is left for
        # torch is small; its own would take the cores from them, and round by how they share.
        packed = config.device == "cpu" and config.dtype == "float32"
        torch.set_num_threads(1 if packed else config.threads)
        board = open_board(config.socket_dir / _BOARD, config.cores, config.borrows)
        runner = ModelRunner.load(
            config.model_path,
            dtype=config.dtype,
            device=config.device,
            block_size=config.block_size,
            quantize=config.quantize,
            kv_dtype=config.kv_dtype,
            threads=config.threads,
            guests=board.guests() if board else (),
            cache_dir=config.cache_dir,
        )
        blocks = config.kv_bytes // runner.layout.block_bytes
        if blocks < 1:
            runner.close()
            raise UnsupportedModelError(
                f"a KV pool of {config.kv_bytes} bytes holds not one block of "
                f"{runner.layout.block_bytes}: give it more memory"
            )
        pool = KVPool(runner.layout, blocks, shared=shared_pool, device=config.device)
        runner.attach(pool)
        if board:
            board.claim()
        runner.warm_up()
        if board:
            board.release()
        log.info("model %s: %s", config.model_path.name, runner.description)
        log.info("%d KV blocks of %s", blocks, runner.layout)
        return cls(runner, pool, thread, Failpoints(config.failpoints), config.step_ms_max, board)

    async def step(
        self,
        slices: Sequence[Slice],
        params: Sequence[SamplingParams | None],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
        cancelled: CancelFlag | None = None,
    ) -> list[int | None]:
        """One step; a new token for each slice that has params, in order (see `sample`).

        Nobody may touch the histories until it ends.

        Raises:
            StepCancelledError: `cancelled` was set meanwhile.
            EngineHangsError: it has not ended in time. The worker is to be replaced.
        """

        def timed() -> _Stepped:
            started_s = time.perf_counter()
            if self._board:
                self._board.claim()
            tokens = self._step(slices, params, positions, histories, cancelled)
            return tokens, (time.perf_counter() - started_s) * 1000

        running = asyncio.get_running_loop().run_in_executor(self._thread, timed)
        tokens, step_ms = await self._in_time(running)
        # One token costs the same whether it continues an answer or ends a prompt.
        sizes = [len(s.tokens) for s in slices]
        sequences = sizes.count(1)
        self.fit.measured(sum(sizes) - sequences, sequences, step_ms)
        return tokens

    def _step(
        self,
        slices: Sequence[Slice],
        params: Sequence[SamplingParams | None],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
        cancelled: CancelFlag | None,
    ) -> list[int | None]:
        logits = self._runner.step(slices, [p is not None for p in params], cancelled)
        self._failpoints.hit(Point.ENGINE_STEP)
        asked = zip(params, positions, histories, strict=True)
        chosen = [(p, position, history) for p, position, history in asked if p is not None]
        if not chosen:
            return []
        return sample(logits, *zip(*chosen, strict=True))

    async def _in_time(self, step: "asyncio.Future[_Stepped]") -> _Stepped:
        try:
            for _ in range(_LOOKS):
                await asyncio.wait([step], timeout=self._step_s_max / _LOOKS)
                if step.done():
                    return step.result()
        finally:
            step.cancel()  # nobody waits for one that goes on
        self._hangs = True
        raise EngineHangsError(f"the engine has not ended a step in {self._step_s_max:g} s")

    @property
    def neighbour_computes(self) -> bool:
        """A worker that has helpers on this one's cores has something for them to do."""
        return self._board is not None and self._board.neighbour_computes

    def lend_cores(self) -> None:
        """Until the next step, which is not to come at once."""
        if self._board:
            self._board.release()

    async def idle(self) -> None:
        """Returns when the steps that were begun have ended, or never will."""
        if self._closed.is_set() or self._hangs:
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)

    def close(self) -> None:
        """Waits for the step that runs. One that hangs keeps its thread and its pool."""
        self._closed.set()
        self._touching.join()
        self._thread.shutdown(wait=not self._hangs, cancel_futures=True)
        if self._hangs:
            return
        self._runner.close()
        self.pool.close()
