"""A router's settings, and workers as it knows them, for tests of its parts."""

from pathlib import Path
from typing import Any

from kvrelay.config import RouterConfig
from router.worker import DecodeWorker


def router_config(**changes: Any) -> RouterConfig:
    return RouterConfig(
        model_path=Path("none"),
        model_name="tiny",
        cluster_key="k" * 16,
        control_socket=Path("none"),
        **changes,
    )


def decode_worker(number: int, **more: Any) -> DecodeWorker:
    return DecodeWorker(
        worker_id=f"d{number}",
        number=number,
        model_fingerprint="m",
        block_size=4,
        blocks_total=100,
        max_model_tokens=400,
        itl_target_ms=0,
        **more,
    )
