"""What the engine bench compares with: the arithmetic of its limits, and which rows there are."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from cluster.bench import limits
from cluster.bench.cases import Case, all_cases, measurable
from cluster.bench.limits import (
    LimitProbe,
    ModelShape,
    decode_compute_limit,
    decode_flops,
    decode_limit,
    prefill_flops,
    prefill_limit,
)
from kvrelay.kv.layout import KVLayout

SHAPE = ModelShape(linear_weights=1000, head_weights=200, layers=2, q_heads=3, head_dim=5)
LAYOUT = KVLayout("f", "float32", layers=2, block_size=16, kv_heads=1, head_dim=8)


def on_meta(model: type, config: object) -> torch.nn.Module:
    with torch.device("meta"):
        return model(config)


def test_prefill_counts_linear_layers_causal_attention_and_one_row_of_logits() -> None:
    linear, scores_and_sums, head = 2 * 1000 * 10, 2 * 2 * (3 * 5) * 2 * (10 * 10 / 2), 2 * 200

    assert prefill_flops(SHAPE, 10) == linear + scores_and_sums + head
    assert prefill_limit(SHAPE, 10, gemm_flops_s=prefill_flops(SHAPE, 10)) == 10.0


def test_decode_reads_the_weights_once_and_the_kv_of_every_sequence() -> None:
    limit = decode_limit(
        batch=4, context=9, weight_bytes=600, kv_token_bytes=10, read_bytes_s=2000.0
    )

    assert limit == 4 * 2000.0 / (600 + 4 * (9 + 1) * 10)


def test_decode_computes_logits_for_every_sequence() -> None:
    assert decode_flops(SHAPE, batch=4, context=9) == 4 * (2 * 1200 + 2 * 2 * 15 * 2 * 10)
    assert decode_compute_limit(SHAPE, 4, 9, decode_flops(SHAPE, 4, 9)) == 4.0


@pytest.mark.parametrize("tied", [True, False])
def test_shape_of_a_model(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )

    shape = ModelShape.of(on_meta(LlamaForCausalLM, config), layers=2, head_dim=4)

    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 40
    assert shape == ModelShape(2 * layer, 100 * 16, layers=2, q_heads=4, head_dim=4)
    assert shape.weight_bytes_fp32 == 4 * (2 * layer + 100 * 16)


def test_shape_counts_linear_layers_by_whatever_name() -> None:
    config = GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=4, n_positions=32)

    shape = ModelShape.of(on_meta(GPT2LMHeadModel, config), layers=1, head_dim=4)

    assert shape is not None
    assert shape.linear_weights == 12 * 16 * 16  # qkv, out, up, down; no table of positions


def test_a_model_with_experts_has_no_limit() -> None:
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )

    assert ModelShape.of(on_meta(MixtralForCausalLM, config), layers=1, head_dim=4) is None


def test_the_best_way_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_GEMM_SIZE", 64)
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 10)
    probe = LimitProbe()
    gemms = len(probe.works) - 3

    found = probe.limits([*[2.0] * (gemms - 1), 1.0, 8.0, 4.0, 16.0])

    assert found.gemm_flops_s == 2 * 64**3 / 1.0
    assert found.read_bytes_s == (1 << 10) / 4.0
    assert all(work() > 0 for work in probe.works)


def test_row_names() -> None:
    names = [case.name for case in all_cases(quick=False)]

    assert names[:5] == [
        "prefill/128",
        "prefill/1024",
        "prefill/4096",
        "decode/b1/c16",
        "decode/b1/c256",
    ]
    assert names[-1] == "decode/b32/c1024"
    assert len(names) == len(set(names)) == 3 + 4 * 3


def test_quick_has_a_few_of_the_same_rows() -> None:
    quick = all_cases(quick=True)

    assert [case.name for case in quick] == ["prefill/128", "decode/b1/c16", "decode/b8/c16"]
    assert set(quick) <= set(all_cases(quick=False))


def test_rows_longer_than_the_model_are_left_out_and_named() -> None:
    chosen, notes = measurable(
        all_cases(quick=False), LAYOUT, positions_max=1024, kv_bytes_max=1e12
    )

    left_out = {"prefill/4096", *(f"decode/b{batch}/c1024" for batch in (1, 8, 16, 32))}
    assert {note.split()[0] for note in notes} == left_out
    assert "prefill/4096 left out: the model ends at 1024 tokens" in notes
    assert not left_out & {case.name for case in chosen}
    assert len(chosen) + len(notes) == 15


def test_rows_that_memory_has_no_room_for_are_left_out_and_named() -> None:
    long = Case("decode", 32, 1024)
    need = long.kv_bytes(LAYOUT)
    assert need == 32 * 65 * LAYOUT.block_bytes

    chosen, notes = measurable([long], LAYOUT, positions_max=None, kv_bytes_max=need - 1)
    assert not chosen
    assert notes == ["decode/b32/c1024 left out: 0.0 GiB of KV, and room for 0.0 GiB"]
    assert measurable([long], LAYOUT, positions_max=None, kv_bytes_max=need) == ([long], [])


def test_a_model_without_an_end_has_all_rows() -> None:
    cases = all_cases(quick=False)

    assert measurable(cases, LAYOUT, positions_max=None, kv_bytes_max=1e12) == (cases, [])
