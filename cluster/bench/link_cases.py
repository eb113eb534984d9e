"""What both processes of `kvrelay bench transport` must agree on."""

from pathlib import Path

from kvrelay.config import Transport, WorkerConfig
from kvrelay.kv.layout import KVLayout

# Blocks as SmolLM2-135M's in float32: 737,280 bytes, 16 tokens.
LAYOUT = KVLayout("bench", "float32", layers=30, block_size=16, kv_heads=3, head_dim=64)
PEER = "bench-decode"

# By the name in a row: what both ends have different from `kvrelay serve`, and over which links.
CASES: dict[str, tuple[dict[str, object], tuple[Transport, ...]]] = {
    "": ({}, ("shm", "tcp")),
    "unchecked": ({"checksums": False}, ("shm", "tcp")),
    "bf16": ({"wire_codec": "bf16"}, ("tcp",)),
    "int8": ({"wire_codec": "int8"}, ("tcp",)),
}


def end_config(folder: Path, case: str) -> WorkerConfig:
    """Settings of either end; the folder is for the unix sockets of all cases."""
    config = WorkerConfig(
        model_path=Path("none"), cluster_key="-" * 16, socket_dir=folder / f"case-{case}"
    )
    return config.model_copy(update=CASES[case][0])
