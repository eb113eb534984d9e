"""`kvrelay bench transport`: the links by themselves, and what they cost a request.

Called by commands.py.
"""

from dataclasses import dataclass

from cluster.bench.handoff import bench_hand_off
from cluster.bench.links import LINKS, bench_links
from cluster.bench.machine import QuietLooks, describe_machine, unrest
from cluster.bench.report import Report, Row
from cluster.bench.timing import Budget
from cluster.model_store import PreparedModel
from cluster.preparation import Progress
from cluster.weights import pack_weights
from kvrelay.cache import default_cache
from kvrelay.config import Quantize

_ROUNDS, _ROUNDS_QUICK = 9, 3
_NOTES = (
    "GB/s of a whole hand-off, first push to acknowledged commit, checksums on; unchecked: off;"
    " bf16, int8: of the fp32 KV that travels so.",
    "limit: memcpy for shm, a loop over a plain socket for tcp. Prompts: beside the same prefill"
    " with no hand-off; gap-1-2: beside the mean of the gaps that follow.",
)


@dataclass(frozen=True)
class TransportBench:
    """What is measured. model: None leaves the requests out."""

    sizes_mb: tuple[int, ...]
    model: PreparedModel | None
    quantize: Quantize
    quick: bool


def bench_transport(asked: TransportBench, on_progress: Progress) -> Report:
    """Raises BenchError when the model cannot be served."""
    others = QuietLooks()
    budget = Budget.quick() if asked.quick else Budget(rounds_min=9, row_s=12.0, turn_s=0.05)
    rows: list[Row] = bench_links(list(asked.sizes_mb), budget, on_progress)
    if asked.model:
        pack_weights(asked.model.path, asked.quantize, default_cache(), on_progress)
        rounds = _ROUNDS_QUICK if asked.quick else _ROUNDS
        for link in LINKS:
            rows += bench_hand_off(asked.model, link, asked.quantize, rounds, on_progress)
    busy = others.cores_busy()
    machine = {**describe_machine(threads=1), "quantize": asked.quantize, "others busy": busy}
    return Report(machine, rows, (*_NOTES, *unrest(busy)))
