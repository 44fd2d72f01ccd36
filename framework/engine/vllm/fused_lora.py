"""LoRA in one product and one kernel per linear, on a GPU. Holds for vllm 0.26.0.

vLLM's own way is three launches per fused linear beside the base's product: zero a buffer, shrink (u = x A^T), expand
(y += u B^T). In decode each takes longer to launch than to run. Here A of every slot lies behind the rows of the base
weight, so that the base's product makes u too, and what is left is one kernel that adds u B^T while it copies y:

    weight  [out, in]        rows 0..out: vLLM's parameter, a view
    A       [n, S, r, in]    the rows behind it: slot s of slice i (q, k, v or gate, up), views in ``lora_a_stacked``

    x [T, in] --- [weight; A]^T ---> [ y | u of slice 0, slot 0 | u of slice 0, slot 1 | ... ]
    out[t, rows of slice i] = y + u[t, i, slot of t] B[i, slot of t]^T       (fp32 sum, rounded once)

Every token computes every slot's u, so this is for few slots: :data:`MAX_SHARE` of the base's rows. A batch without
adapters skips both. Linears with a bias, and those with more slots, keep vLLM's kernels. The class attributes of vLLM
that are replaced: ``UnquantizedLinearMethod.create_weights``, ``BaseLinearLayerWithLoRA.create_lora_weights`` and
``_apply_sync``, ``MergedColumnParallelLinearWithLoRA.create_lora_weights``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from framework.errors import ConfigError
from framework.kernels.product import product

MAX_SHARE = 4
"""The rows of A may be at most one in so many of the base's."""
EXTENDED = "tandem_extended"
"""Attribute of vLLM's linear that holds the weight with A behind it; absent where vLLM's kernels are kept."""


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    full_ptr, b_ptr, to_b1, to_b2, slot_ptr, y_ptr, tokens,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, STRIDE: tl.constexpr, SLOTS: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # noqa: N803
):  # fmt: skip
    block = tl.program_id(1)
    blocks0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    out: tl.constexpr = N0 + N1 + N2
    second, third = block >= blocks0, block >= blocks0 + blocks1
    block -= tl.where(third, blocks0 + blocks1, tl.where(second, blocks0, 0))
    size = tl.where(third, N2, tl.where(second, N1, N0))
    start = tl.where(third, N0 + N1, tl.where(second, N0, 0))
    first_u = out + tl.where(third, 2, tl.where(second, 1, 0)) * (SLOTS * RANK)
    b_ptr += tl.where(third, to_b2, tl.where(second, to_b1, 0))
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    slot = tl.load(slot_ptr + row, mask=row < tokens, other=-1)
    inside = (row < tokens)[:, None] & (column < size)[None, :]
    source = full_ptr + row.to(tl.int64)[:, None] * STRIDE
    y = tl.load(source + start + column[None, :], mask=inside, other=0.0)
    total = y.to(tl.float32)
    for s in tl.static_range(SLOTS):
        mine = slot == s
        if tl.max(mine.to(tl.int32)) > 0:
            u = tl.load(source + first_u + s * RANK + r[None, :], mask=mine[:, None] & (r < RANK)[None, :], other=0.0)
            place = b_ptr + (s * size + column[None, :]) * RANK + r[:, None]
            b = tl.load(place, mask=(column < size)[None, :] & (r < RANK)[:, None], other=0.0)
            total += tl.dot(u, b)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * out + start + column[None, :], total.to(y.dtype), mask=inside)


def expand(full: Tensor, b: list[Tensor], slot_of: Tensor) -> Tensor:
    """Adds each token's adapter to the base's product.

    Args:
        full: ``[T, out + n * slots * rank]`` contiguous, of the extended weight.
        b: per slice ``[slots, 1, rows, rank]``, contiguous; the rows add up to ``out``.
        slot_of: ``[T]`` int32, the slot of each token, -1 for none.

    Returns:
        ``[T, out]`` contiguous.
    """
    tokens, slots, rank = len(full), b[0].shape[0], b[0].shape[3]
    sizes = [part.shape[2] for part in b] + [0] * (3 - len(b))
    y = full.new_empty(tokens, sum(sizes))
    block_m, block_n = 64, 64  # also for few tokens: a smaller tile is another instruction, which sums otherwise
    grid = (triton.cdiv(tokens, block_m), sum(triton.cdiv(size, block_n) for size in sizes))
    # Slices are found by their distance from the first: Triton does not choose between pointers.
    far = [(part.data_ptr() - b[0].data_ptr()) // b[0].element_size() for part in b] + [0] * (3 - len(b))
    _expand[grid](
        full, b[0], far[1], far[2], slot_of, y, tokens,
        N0=sizes[0], N1=sizes[1], N2=sizes[2], STRIDE=full.shape[1], SLOTS=slots, RANK=rank,
        BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y


def linear_with_slots(
    x: Tensor, extended: Tensor, b: list[Tensor], slot_of: Tensor, no_adapter: Tensor, exact: bool
) -> Tensor:
    """``[T, in] -> [T, out]``; the operator that vLLM's graphs call.

    Args:
        x: contiguous.
        extended: ``[out + n * slots * rank, in]``.
        b: see :func:`expand`.
        slot_of: see :func:`expand`.
        no_adapter: one bool on the host: no token of the batch has an adapter. Read at capture, as vLLM's operators do.
        exact: with products whose rows do not depend on the batch.
    """
    multiply = product if exact else torch.nn.functional.linear
    if no_adapter.item():
        return multiply(x, extended[: sum(part.shape[2] for part in b)])
    return expand(multiply(x, extended), b, slot_of)


def _shape_only(
    x: Tensor, extended: Tensor, b: list[Tensor], slot_of: Tensor, no_adapter: Tensor, exact: bool
) -> Tensor:
    return x.new_empty(x.shape[0], sum(part.shape[2] for part in b))


def install(parents: tuple[str, ...], *, slots: int, rank: int, exact: bool) -> None:
    """Makes engines that start from now on in this process keep A behind the base weights of these linears.

    Args:
        parents: names of the linears with adapters, e.g. ``("qkv_proj", "down_proj")``; none for no adapters.
        slots: adapters the engine holds at once.
        rank: width of a slot.
        exact: with products whose rows do not depend on the batch.
    """
    from vllm.lora.layers import base_linear, column_parallel_linear
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "tandem_linear_with_slots"):
        direct_register_custom_op("tandem_linear_with_slots", linear_with_slots, fake_impl=_shape_only)
    UnquantizedLinearMethod.create_weights = _extending(
        _original(UnquantizedLinearMethod, "create_weights"), parents, slots, rank, exact
    )
    for kind in (
        base_linear.BaseLinearLayerWithLoRA,
        column_parallel_linear.MergedColumnParallelLinearWithLoRA,
    ):
        kind.create_lora_weights = _placing(_original(kind, "create_lora_weights"))
    base = base_linear.BaseLinearLayerWithLoRA
    base._apply_sync = _applying(_original(base, "_apply_sync"), exact)


def _original(kind: Any, name: str) -> Any:
    """vLLM's own method, also when another engine of this process has replaced it before."""
    method = vars(kind)[name]
    return getattr(method, "replaces", method)


def _extending(original: Any, parents: tuple[str, ...], slots: int, rank: int, exact: bool) -> Callable[..., None]:
    def create_weights(
        method: Any,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *others: Any,
        **named: Any,
    ) -> None:
        width, parts = input_size_per_partition, output_partition_sizes
        rows, more = sum(parts), len(parts) * slots * rank
        with_adapter = layer.prefix.rpartition(".")[2] in parents
        if not with_adapter or layer.has_bias or more * MAX_SHARE > rows:
            if with_adapter and exact:
                raise ConfigError(_why_not_exact(layer, rows, slots, rank, len(parts)))
            original(method, layer, width, parts, *others, **named)
            return
        # One allocation: a second one, of which the first is then freed, leaves the pool of the weights full of holes.
        original(method, layer, width, [*parts, more], *others, **named)
        extended = layer.weight.data
        extended[rows:].zero_()
        setattr(layer, EXTENDED, extended)
        layer.weight.data = extended[:rows]

    create_weights.replaces = original  # type: ignore[attr-defined]
    return create_weights


def _why_not_exact(layer: Any, rows: int, slots: int, rank: int, parts: int) -> str:
    if layer.has_bias:
        return (
            f"numerics=exact: {layer.prefix} has a bias, and with an adapter on it vLLM's own kernels sum in another "
            f"order; use numerics=fast, or lora.targets without its projections"
        )
    return (
        f"numerics=exact: the adapters of {layer.prefix} have {parts} x {slots} x {rank} rows, the layer {rows}; they "
        f"may be a quarter of it: lower engine.max_adapters={slots} or the rank (lora.rank, in the service "
        f"service.max_rank)"
    )


def _placing(original: Any) -> Callable[..., None]:
    def create_lora_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        original(layer, *args, **kwargs)
        extended = getattr(layer.base_layer, EXTENDED, None)
        if extended is None:
            return
        out = sum(part.shape[2] for part in layer.lora_b_stacked)
        assert layer.base_layer.weight.data_ptr() == extended.data_ptr(), "vLLM has moved the base weight"
        behind = extended[out:].view(len(layer.lora_a_stacked), *layer.lora_a_stacked[0].shape)
        layer.lora_a_stacked = tuple(behind.unbind(0))

    create_lora_weights.replaces = original  # type: ignore[attr-defined]
    return create_lora_weights


def _applying(original: Any, exact: bool) -> Callable[..., Tensor]:
    def apply_sync(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        extended = getattr(layer.base_layer, EXTENDED, None)
        if extended is None or bias is not None or x.ndim != 2:
            return original(layer, x, bias)
        meta = layer.punica_wrapper.token_mapping_meta
        slot_of = meta.token_lora_mapping[: x.size(0)]
        b = list(layer.lora_b_stacked)
        return torch.ops.vllm.tandem_linear_with_slots(x, extended, b, slot_of, meta.no_lora_flag_cpu, exact)

    apply_sync.replaces = original  # type: ignore[attr-defined]
    return apply_sync
