import numpy as np
import pytest

from kvrelay.engine.kernels.stream import stream_copy


@pytest.mark.parametrize("count", [0, 1, 63, 64, 255, 256, 257, 1000, 4096, 737_280])
@pytest.mark.parametrize("shift", [0, 1, 37, 64])
def test_exactly_the_bytes_asked_for_are_copied(count, shift):
    source = np.random.default_rng(count).integers(0, 256, count + 5, np.uint8)
    target = np.zeros(count + 200, np.uint8)
    stream_copy(source[5:], target[shift : shift + count])
    assert (target[shift : shift + count] == source[5:]).all()
    assert not target[:shift].any()
    assert not target[shift + count :].any()


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="10 bytes do not fit 9"):
        stream_copy(np.zeros(10, np.uint8), np.zeros(9, np.uint8))
