import pytest

from cluster.capacity.device import ByHand, DeviceProfile, HandOffTime, StepTime


@pytest.fixture
def device() -> DeviceProfile:
    """A small device with every part of a step's cost."""
    return DeviceProfile(
        name="test",
        source=ByHand(text="a test"),
        step=StepTime(
            base_ms=4.0,
            ms_per_prompt_token=0.5,
            ms_per_attended=0.001,
            ms_per_sequence=1.0,
            ms_per_context_token=0.01,
        ),
        hand_offs=(HandOffTime(link="shm", fixed_ms=2.0, ms_per_block=0.25),),
        router_ms=1.0,
        block_tokens=16,
        block_bytes=1024,
        kv_blocks=400,
        batch_max=16,
        chunk_tokens=64,
    )
