"""What the engine promises of the real model: int8 costs little quality, a worker little memory."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from cluster.bench.loading import EngineChoice
from cluster.bench.perplexity import bench_perplexity, name_of
from cluster.bench.text import TEXT, read_text
from cluster.model_store import PreparedModel, prepare
from kvrelay.cache import default_cache
from kvrelay.config import KvDtype
from kvrelay.engine import packing
from kvrelay.engine.prepared import WEIGHTS

PERPLEXITY_MAX = 1.01  # of fp32's
WORKER_BYTES_MAX = 600e6  # beside its weights and its KV pool
KV_BYTES = 64 << 20

# A worker's engine loads, runs a prompt over its whole pool, and says how much memory it ever held.
WORKER = """
import asyncio, sys
from pathlib import Path
from kvrelay.config import WorkerConfig
from kvrelay.engine.host import EngineHost
from kvrelay.engine.step import Slice

async def main():
    path, kv_bytes = Path(sys.argv[1]), int(sys.argv[2])
    config = WorkerConfig(
        model_path=path, cluster_key="k" * 16, socket_dir=path, quantize="int8", kv_bytes=kv_bytes
    )
    engine = await EngineHost.load(config, shared_pool=True)
    blocks = list(range(engine.pool.blocks))
    for start in range(0, len(blocks) * 16, 256):
        tokens = [5] * min(256, len(blocks) * 16 - start)
        await engine.step([Slice(tokens, start, blocks)], [None], [0], [None])
    # Not getrusage: its figure begins with what the parent held at the fork.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print("peak", peak, "transformers" in sys.modules)
    engine.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def model() -> PreparedModel:
    return prepare("smollm2")


# Over a minute each; int8 KV, which auto takes here, costs the more of the two.
@pytest.mark.parametrize("kv_dtype", ["auto", pytest.param("float32", marks=pytest.mark.slow)])
def test_int8_costs_at_most_one_per_cent_of_perplexity(
    model: PreparedModel, kv_dtype: KvDtype
) -> None:
    choice = EngineChoice("int8", kv_dtype, threads=len(os.sched_getaffinity(0)))
    report = bench_perplexity(model, read_text(TEXT), choice, lambda what, fraction: None)
    found: dict[str, Any] = {row.name: row.value for row in report.rows}
    assert found["perplexity/fp32"] == pytest.approx(found["perplexity/transformers"], rel=1e-4)
    assert found[name_of(choice)] / found["perplexity/fp32"] <= PERPLEXITY_MAX


def test_a_worker_holds_its_weights_its_pool_and_little_else(model: PreparedModel) -> None:
    entry = packing.prepare(model.path, "int8", default_cache())
    stored = (entry.path / WEIGHTS).stat().st_size
    said = subprocess.run(
        [sys.executable, "-c", WORKER, str(model.path), str(KV_BYTES)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    match = re.search(r"peak (\d+) (\w+)", said)
    assert match is not None
    assert int(match[1]) <= stored + KV_BYTES + WORKER_BYTES_MAX
    assert match[2] == "False"  # transformers is not even imported where all is prepared
