"""What both processes of `kvrelay bench transport` must agree on."""

from pathlib import Path

from kvrelay.config import WorkerConfig
from kvrelay.kv.layout import KVLayout

# Blocks as SmolLM2-135M's in float32: 737,280 bytes, 16 tokens.
LAYOUT = KVLayout("bench", "float32", layers=30, block_size=16, kv_heads=3, head_dim=64)
PEER = "bench-decode"
LISTENERS = {"checked": True, "unchecked": False}  # whether blocks have checksums


def peer_config(folder: Path, checksums: bool) -> WorkerConfig:
    """Settings of either end, as in `kvrelay serve` but for the checksums."""
    return WorkerConfig(
        model_path=Path("none"), cluster_key="-" * 16, socket_dir=folder, checksums=checksums
    )
