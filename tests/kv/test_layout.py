from dataclasses import fields, replace

import pytest
from kv_fixtures import LAYOUT

from kvrelay.kv.layout import DTYPE_BYTES, KVLayout


def test_a_block_is_layers_by_k_and_v_by_slots_by_heads_by_dim():
    assert LAYOUT.block_shape == (2, 2, 4, 1, 2)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_block_bytes_follow_from_shape_and_dtype(dtype, size):
    assert replace(LAYOUT, dtype=dtype).block_bytes == 2 * 2 * 4 * 1 * 2 * size


@pytest.mark.parametrize(
    ("block_size", "kv_heads", "head_dim", "side_bytes"),
    [
        (16, 3, 64, 16 * 3 * 64 + 16 * 3 * 4),
        (4, 1, 2, 4 * 64 + 64),  # a head fills a line, scales fill one
        (5, 3, 96, 5 * 3 * 128 + 64),
        (1, 2, 128, 2 * 128 + 64),
    ],
)
def test_int8_sides_are_vectors_of_whole_lines_and_then_scales(
    block_size, kv_heads, head_dim, side_bytes
):
    layout = KVLayout("x", "int8", 7, block_size, kv_heads, head_dim)
    assert layout.side_bytes == side_bytes
    assert layout.vectors_bytes == block_size * kv_heads * layout.head_bytes
    assert layout.block_bytes == 7 * 2 * side_bytes


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_a_block_is_two_sides_a_layer(dtype):
    layout = replace(LAYOUT, dtype=dtype)
    assert layout.block_bytes == layout.layers * 2 * layout.side_bytes


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(tokens, blocks):
    assert LAYOUT.blocks_for(tokens) == blocks


def test_a_layout_survives_the_wire():
    message = LAYOUT.to_wire()
    again = KVLayout.from_wire(type(message).FromString(message.SerializeToString()))
    assert again == LAYOUT


def test_equal_layouts_have_no_differences():
    assert LAYOUT.differences(replace(LAYOUT)) == ""


@pytest.mark.parametrize("field", [field.name for field in fields(KVLayout)])
def test_every_field_that_differs_is_named_with_both_values(field):
    ours = getattr(LAYOUT, field)
    theirs = "other" if isinstance(ours, str) else ours + 1
    other = replace(LAYOUT, **{field: theirs})
    assert LAYOUT.differences(other) == f"{field}: {ours} here, {theirs} there"


def test_all_differences_are_told_at_once():
    other = replace(LAYOUT, dtype="float16", block_size=8)
    assert LAYOUT.differences(other) == (
        "dtype: float32 here, float16 there, block_size: 4 here, 8 there"
    )
