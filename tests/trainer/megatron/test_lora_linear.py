"""The LoRA product with its hand-written backward against autograd, and dropout's masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.distributed import Mesh
from framework.trainer.megatron.lora_linear import (
    ColumnParallelLinear,
    FactorSlice,
    LoraSwitch,
    ModuleFactors,
    ParallelLinear,
    RowParallelLinear,
)
from framework.trainer.megatron.pointwise import PLAIN

TOKENS, IN, RANK = 11, 8, 3
ROWS = (6, 4, 4)
"""Of q, k and v."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(present: tuple[int, ...], *, dropout: float = 0.0) -> ModuleFactors:
    """Adapters on some of the three slices of a fused module."""
    slices = []
    for place, index in enumerate(present):
        start = sum(ROWS[:index])
        slices.append(
            FactorSlice(
                rows=slice(start, start + ROWS[index]),
                columns=slice(place * RANK, (place + 1) * RANK),
                b=random(ROWS[index], RANK, seed=10 + index),
                b_grad=torch.zeros(ROWS[index], RANK, dtype=torch.float64),
            )
        )
    a = random(len(present) * RANK, IN, seed=20)
    return ModuleFactors(a_all=a, a_grad=torch.zeros_like(a), slices=tuple(slices), dropout=dropout, dropout_seed=77)


def linear(mesh: Mesh, switch: LoraSwitch, kind: type[ParallelLinear] = ColumnParallelLinear) -> ParallelLinear:
    module = kind("fused", mesh, switch, sequence_parallel=False, pointwise=PLAIN)
    module.weight, module.bias = random(sum(ROWS), IN, seed=1), random(sum(ROWS), seed=2)
    return module


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_product_and_gradients_equal_autograd(present: tuple[int, ...], dropout: float, mesh: Mesh) -> None:
    switch, parts = LoraSwitch(), factors(present, dropout=dropout)
    switch.modules, switch.training = {"fused": parts}, True
    module = linear(mesh, switch)
    x, dy = random(TOKENS, IN, seed=3).requires_grad_(), random(TOKENS, sum(ROWS), seed=4)
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, dy)

    mask = module._mask(x, parts)
    assert module.bias is not None
    a = parts.a_all.clone().requires_grad_()
    bs = [part.b.clone().requires_grad_() for part in parts.slices]
    want = x @ module.weight.t() + module.bias
    for part, b in zip(parts.slices, bs, strict=True):
        delta = (x if mask is None else x * mask) @ a[part.columns].t() @ b.t()
        want = want + torch.nn.functional.pad(delta, (part.rows.start, sum(ROWS) - part.rows.stop))
    torch.testing.assert_close(y, want)
    want_dx, want_da, *want_dbs = torch.autograd.grad(want, (x, a, *bs), dy)
    torch.testing.assert_close(dx, want_dx)
    torch.testing.assert_close(parts.a_grad, want_da)
    for part, want_db in zip(parts.slices, want_dbs, strict=True):
        torch.testing.assert_close(part.b_grad, want_db)


def test_gradients_are_added_to_what_is_there(mesh: Mesh) -> None:
    switch, parts = LoraSwitch(), factors((0, 1))
    switch.modules = {"fused": parts}
    module, x = linear(mesh, switch), random(TOKENS, IN, seed=3).requires_grad_()
    module(x).sum().backward()
    once = [parts.a_grad.clone(), *(part.b_grad.clone() for part in parts.slices)]
    module(x).sum().backward()
    for first, second in zip(once, [parts.a_grad, *(part.b_grad for part in parts.slices)], strict=True):
        assert torch.equal(second, 2 * first)


def test_another_modules_adapter_is_not_applied(mesh: Mesh) -> None:
    switch = LoraSwitch()
    module, x = linear(mesh, switch), random(TOKENS, IN, seed=3)
    base = module(x)
    switch.modules = {"elsewhere": factors((0,))}
    assert torch.equal(module(x), base)
    switch.modules = {"fused": factors((0,))}
    changed = module(x) - base
    assert changed[:, :6].abs().min() > 0
    assert changed[:, 6:].abs().max() == 0, "an adapter on q alone leaves k and v"


def test_dropout_masks(mesh: Mesh) -> None:
    """Scaled to keep the mean, drawn from the counter alone, off outside training."""
    switch, parts = LoraSwitch(), factors((0,), dropout=0.25)
    module = linear(mesh, switch)
    x = torch.ones(500, 400)
    assert module._mask(x, parts) is None
    switch.training = True
    first = module._mask(x, parts)
    assert first is not None
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert first.mean().item() == pytest.approx(1.0, abs=0.01)
    torch.manual_seed(1)
    again = module._mask(x, parts)
    assert again is not None
    assert torch.equal(first, again), "the global random state has no part in it"
    switch.dropout_counter += 1
    other = module._mask(x, parts)
    assert other is not None
    overlap = ((first == 0) & (other == 0)).float().mean().item()
    assert overlap == pytest.approx(0.0625, abs=0.005), "masks of two microbatches are independent"
    assert module._mask(x, factors((0,))) is None


def test_a_row_parallel_rank_takes_its_columns_of_the_whole_mask(mesh: Mesh) -> None:
    import dataclasses

    whole_switch, parts = LoraSwitch(), factors((0,), dropout=0.5)
    whole_switch.training = True
    whole = linear(mesh, whole_switch, RowParallelLinear)._mask(torch.ones(5, 8), parts)
    assert whole is not None
    for rank in range(2):
        half = dataclasses.replace(mesh, tp_size=2, tp_rank=rank)
        mask = linear(half, whole_switch, RowParallelLinear)._mask(torch.ones(5, 4), parts)
        assert mask is not None
        assert torch.equal(mask, whole[:, rank * 4 : rank * 4 + 4])
