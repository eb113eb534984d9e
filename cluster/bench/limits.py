"""What the machine allows: matrix arithmetic and memory reads, measured; and what that means for a
model's tokens per second. Called by the engine bench.

The limits are those of a model whose every weight is used for every token. For others
`ModelShape.of` gives None, and their rows have no limit.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.timing import Work, timed

_GEMM_SIZE = 2048
_READ_BYTES = 256 << 20  # far more than any cache of a machine this is meant for
_FP32_BYTES = 4


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic below needs to know of a model.

    linear_weights: in all linear layers but the last, lm_head; head_weights: in lm_head.
    """

    linear_weights: int
    head_weights: int
    layers: int
    q_heads: int
    head_dim: int

    @property
    def weight_bytes_fp32(self) -> int:
        """Bytes of weights that one decode step reads when they are stored as fp32."""
        return (self.linear_weights + self.head_weights) * _FP32_BYTES

    @classmethod
    def of(cls, model: Any, *, layers: int, head_dim: int) -> "ModelShape | None":
        """The shape of a transformers model, whose tensors may lie on torch's meta device.

        None for a model with experts or convolutions: not all of its weights meet every token.
        """
        import torch

        if any(parameter.dim() > 2 for parameter in model.parameters()):
            return None
        head = model.get_output_embeddings()
        linear = 0
        for module in model.modules():
            weight = getattr(module, "weight", None)
            is_table = isinstance(module, torch.nn.Embedding) or module is head
            if isinstance(weight, torch.Tensor) and weight.dim() == 2 and not is_table:
                linear += weight.numel()
        return cls(
            linear_weights=linear,
            head_weights=0 if head is None else head.weight.numel(),
            layers=layers,
            q_heads=model.config.get_text_config().num_attention_heads,
            head_dim=head_dim,
        )


def prefill_flops(shape: ModelShape, tokens: int) -> float:
    """Floating point operations of a prompt: linear layers, causal attention, one row of logits."""
    linear = 2 * shape.linear_weights * tokens
    # Scores and weighted sums; half of the square, for no token looks ahead.
    attention = 2 * 2 * shape.q_heads * shape.head_dim * shape.layers * tokens**2 / 2
    return linear + attention + 2 * shape.head_weights


def decode_flops(shape: ModelShape, batch: int, context: int) -> float:
    """Floating point operations of one step of `batch` sequences with `context` tokens each."""
    linear = 2 * (shape.linear_weights + shape.head_weights)
    attention = 2 * 2 * shape.q_heads * shape.head_dim * shape.layers * (context + 1)
    return float(batch * (linear + attention))


def prefill_limit(shape: ModelShape, tokens: int, gemm_flops_s: float) -> float:
    """Tokens per second if every operation ran at the speed of one large matrix product."""
    return tokens * gemm_flops_s / prefill_flops(shape, tokens)


def decode_limit(
    *, batch: int, context: int, weight_bytes: int, kv_token_bytes: int, read_bytes_s: float
) -> float:
    """Tokens per second if a step did nothing but read the weights once and the KV of everyone."""
    read = weight_bytes + batch * (context + 1) * kv_token_bytes
    return batch * read_bytes_s / read


def decode_compute_limit(shape: ModelShape, batch: int, context: int, gemm_flops_s: float) -> float:
    """Tokens per second if a step did nothing but arithmetic, at the speed of a matrix product."""
    return batch * gemm_flops_s / decode_flops(shape, batch, context)


@dataclass(frozen=True)
class MachineLimits:
    """The machine's own speeds while one row was measured."""

    gemm_flops_s: float
    read_bytes_s: float


class LimitProbe:
    """Work that does nothing but arithmetic, or nothing but read, for `interleaved_medians`.

    It takes turns with the programs that are measured and its median counts, as theirs does: the
    speed of a shared machine's memory changes within seconds, by a half and more.
    """

    def __init__(self) -> None:
        import torch

        # Threads hold their share of `memory`, so the pages are faulted in and read in one order.
        memory = torch.ones(_READ_BYTES // _FP32_BYTES)
        a, b = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE)
        gemms: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
        if prepacked := _prepacked_gemm(a, b):
            gemms.append(prepacked)
        # Which of the reads is the fastest depends on the processor.
        reads: list[Callable[[], object]] = [memory.norm, memory.amax, memory.sum]
        self._gemms, self._reads = _warm(gemms), _warm(reads)

    @property
    def works(self) -> list[Work]:
        return [*self._gemms, *self._reads]

    def limits(self, seconds: Sequence[float]) -> MachineLimits:
        """Of the median times of `works`: the best way to do either counts."""
        gemm_s, read_s = seconds[: len(self._gemms)], seconds[len(self._gemms) :]
        return MachineLimits(2 * _GEMM_SIZE**3 / min(gemm_s), _READ_BYTES / min(read_s))


def _warm(calls: Sequence[Callable[[], object]]) -> list[Work]:
    """The first call starts threads and allocates."""
    for call in calls:
        call()
    return [functools.partial(timed, call) for call in calls]


def _prepacked_gemm(a: Any, b: Any) -> Callable[[], object] | None:
    """oneDNN's product with a weight in its own order, where this build of torch has it: on some
    processors it is half as fast again as torch.mm."""
    import torch

    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(b, _GEMM_SIZE)

        def multiply() -> object:
            return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")

        multiply()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return multiply
