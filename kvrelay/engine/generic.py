"""Any decoder-only model: transformers' own modules, with our attention and packed linear layers.

Called by ModelRunner for what is not fused, and for GPUs and half precision, where the linear
layers stay transformers' own too.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kvrelay.engine.attention import paged_step, run_paged
from kvrelay.engine.kernels import rows
from kvrelay.engine.kernels.threads import GUEST_ROWS_MIN, Team, aligned
from kvrelay.engine.kernels.tiles import BUFFER, linear, run_linear
from kvrelay.engine.packed import linear_record, pack
from kvrelay.engine.probe import ERROR_MAX, ERROR_MAX_INT8, Watched, check_logits
from kvrelay.engine.shapes import (
    GROUP,
    GROUP_SCALE_BYTES,
    LINE_BYTES,
    PANEL,
    PackedShape,
)
from kvrelay.engine.step import CancelFlag, Slice, UnsupportedModelError
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import TORCH_DTYPES, KVPool

_SHARED_MIN = 1 << 20  # multiplications below which waking a helper costs more than it brings


def load_model(path: Path, dtype: str, device: str) -> Any:
    """The model in `path` with its own attention, as eager as every architecture has it."""
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=TORCH_DTYPES[dtype],
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )
    return model.to(device).eval().requires_grad_(False)


def linear_weights(model: Any, int8: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Packed weights of every linear layer, by the module's name."""
    for name, module in _linears(model):
        weight = _matrix(module)
        shape = PackedShape(weight.shape[0], weight.shape[1], int8)
        yield name, pack(weight.detach().float().numpy(), shape)


def linear_names(model: Any) -> list[str]:
    return [name for name, _ in _linears(model)]


def pack_linears(model: Any, weights: Mapping[str, np.ndarray], int8: bool, team: Team) -> None:
    """Replaces every linear layer by one over `weights`, and lets go of its own."""
    for name, module in list(_linears(model)):
        outputs, inputs = _matrix(module).shape
        packed = PackedLinear(PackedShape(outputs, inputs, int8), weights[name], module.bias, team)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)


def _linears(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        if type(module) in (torch.nn.Linear, Conv1D):  # a subclass may compute something else
            yield name, module


def _matrix(module: Any) -> torch.Tensor:
    """`[outputs, inputs]`."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


class PackedLinear(torch.nn.Module):
    """x `[..., inputs]` float32 to `[..., outputs]`."""

    def __init__(
        self, shape: PackedShape, weights: np.ndarray, bias: torch.Tensor | None, team: Team
    ) -> None:
        super().__init__()
        self.bias = bias
        self._shape = shape
        self._weights = weights  # keeps the memory alive
        self._record = linear_record(shape, weights.ctypes.data)
        self._team = team
        self._counter = aligned(LINE_BYTES, np.uint8)

    @property
    def size_bytes(self) -> int:
        return self._shape.size_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self._shape
        source = x.reshape(-1, shape.inputs).contiguous()
        count = source.shape[0]
        out = torch.empty(count, shape.panels * PANEL)
        quantized, scales = self._quantized(source) if shape.int8 else (source, source)
        self._counter.fill(0)
        buffers = [_buffer(part) for part in (source, quantized, scales, out)]
        counter, seats = self._counter.ctypes.data, self._team.seats
        arguments = (self._record[()], count, *buffers, 0)
        if count * shape.inputs * shape.outputs < _SHARED_MIN:
            linear(counter, seats[0], *arguments)
        else:
            self._team.run(
                lambda thread, number: run_linear(thread, number, seats, counter, *arguments),
                with_guests=count >= GUEST_ROWS_MIN,
            )
        answer = out[:, : shape.outputs]
        if self.bias is not None:
            answer = answer + self.bias
        return answer.reshape(*x.shape[:-1], shape.outputs)

    def _quantized(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = self._shape.groups
        if source.shape[1] != groups * GROUP:
            missing = groups * GROUP - source.shape[1]
            source = torch.nn.functional.pad(source, (0, missing))
        quantized = torch.empty(source.shape, dtype=torch.int8)
        scales = torch.empty(len(source), groups * GROUP_SCALE_BYTES, dtype=torch.uint8)
        rows.quantize_rows(
            source.data_ptr(), len(source), groups, quantized.data_ptr(), scales.data_ptr()
        )
        return quantized, scales


def _buffer(tensor: torch.Tensor) -> Any:
    return np.array((tensor.data_ptr(), tensor.stride(0) * tensor.element_size()), BUFFER)[()]


class GenericModel:
    """A transformers model that has our attention; `attach` a pool first."""

    def __init__(self, model: Any, team: Team) -> None:
        self.team = team
        self._model = model
        self._pool: KVPool | None = None

    def attach(self, pool: KVPool) -> None:
        self._pool = pool

    def check(self, watched: Watched, layout: KVLayout, *, int8: bool) -> None:
        """Raises UnsupportedModelError, and closes, when its logits are not those watched."""

        def run(pool: KVPool, chunk: Slice) -> torch.Tensor:
            self.attach(pool)
            return self.step([chunk], [len(chunk.tokens) - 1], CancelFlag())[0]

        own = str(self._model.dtype).removeprefix("torch.")
        error_max = max(ERROR_MAX[layout.dtype], ERROR_MAX[own], ERROR_MAX_INT8 if int8 else 0.0)
        try:
            check_logits(watched, layout, run, error_max)
        except UnsupportedModelError:
            self.close()
            raise
        self._pool = None

    @property
    def weight_bytes(self) -> int:
        """Weights that every decode step reads: all but the table of embeddings."""
        packed = [m for m in self._model.modules() if isinstance(m, PackedLinear)]
        table = self._model.get_input_embeddings().weight
        own = {p.data_ptr(): p.numel() * p.element_size() for p in self._model.parameters()}
        head = self._model.get_output_embeddings()
        if isinstance(head, PackedLinear) or head.weight.data_ptr() != table.data_ptr():
            own.pop(table.data_ptr(), None)
        return sum(own.values()) + sum(linear.size_bytes for linear in packed)

    def step(
        self, slices: Sequence[Slice], last_rows: Sequence[int], cancelled: CancelFlag
    ) -> torch.Tensor:
        """Logits `[len(last_rows), vocab]` float32 of those rows.

        Raises:
            StepCancelledError: `cancelled` was set meanwhile.
        """
        assert self._pool is not None, "attach a pool first"
        step = paged_step(self._pool, slices, cancelled, self.team)
        return run_paged(self._model, step, last_rows)

    def close(self) -> None:
        self.team.close()
