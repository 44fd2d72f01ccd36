"""One adapter's optimizer against torch.optim.AdamW on the same gradient, and the layout of its flat vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from framework.device import HOST
from framework.distributed import Mesh
from framework.lora.init import init_a
from framework.lora.spec import LoraSpec
from framework.models.spec import read_spec
from framework.trainer.megatron.adapter import AdapterState
from framework.types import AdamParams


def make(tiny: dict[str, Path], mesh: Mesh, dtype: torch.dtype = torch.float32, **spec: object) -> AdapterState:
    lora = LoraSpec(**{"rank": 3, "alpha": 7.0, **spec})  # type: ignore[arg-type]
    return AdapterState(read_spec(tiny["qwen3"]), lora, mesh, seed=5, dtype=dtype, device=HOST)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_torch_adamw(max_grad_norm: float, weight_decay: float, tiny: dict[str, Path], mesh: Mesh) -> None:
    state = make(tiny, mesh)
    params = AdamParams(
        learning_rate=3e-3, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )
    twin = torch.nn.Parameter(state.master.clone())
    optimizer = torch.optim.AdamW([twin], lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        gradient = torch.randn(state.master.shape, generator=generator)
        state.grad.copy_(gradient)
        twin.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([twin], max_grad_norm or float("inf"))
        optimizer.step()
        result = state.optim_step(params)
        assert result.step == step
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        torch.testing.assert_close(state.master, twin.detach(), rtol=1e-6, atol=1e-7)
        assert state.grad.abs().max() == 0


def test_the_learning_rate_is_of_the_call(tiny: dict[str, Path], mesh: Mesh) -> None:
    state = make(tiny, mesh)
    before = state.master.clone()
    state.grad.fill_(1.0)
    state.optim_step(AdamParams(learning_rate=0.0))
    assert torch.equal(state.master, before)
    state.grad.fill_(1.0)
    state.optim_step(AdamParams(learning_rate=1e-3))
    torch.testing.assert_close(before - state.master, torch.full_like(before, 1e-3), rtol=1e-3, atol=0)


def test_weights_are_the_masters_with_the_scale_in_b(tiny: dict[str, Path], mesh: Mesh) -> None:
    """In bf16 the product is rounded once, after scaling in float32."""
    state = make(tiny, mesh, dtype=torch.bfloat16, use_rslora=True)
    state.master.normal_(generator=torch.Generator().manual_seed(2))
    state.publish()
    for path, shard in state.shards().items():
        assert torch.equal(shard.a, state.a[path].view(state.master).bfloat16())
        assert torch.equal(shard.b, (state.b[path].view(state.master) * (7.0 / 3.0**0.5)).bfloat16())


def test_small_steps_are_not_lost_in_bf16(tiny: dict[str, Path], mesh: Mesh) -> None:
    """Masters are fp32: a hundred updates of 1e-5 move a weight of 0.1 by 1e-3, each below bf16's resolution."""
    state = make(tiny, mesh, dtype=torch.bfloat16)
    state.master.fill_(0.1)
    for _ in range(100):
        state.grad.fill_(1.0)
        state.optim_step(AdamParams(learning_rate=1e-5))
    assert state.master.mean().item() == pytest.approx(0.1 - 1e-3, rel=1e-4)


def test_factors_tile_the_vector_without_overlap(tiny: dict[str, Path], mesh: Mesh) -> None:
    state = make(tiny, mesh, targets=("q_proj", "v_proj", "o_proj", "up_proj"))
    owners = torch.zeros_like(state.master)
    for piece in (*state.a.values(), *state.b.values()):
        piece.view(owners).add_(1)
    assert torch.equal(owners, torch.ones_like(owners))
    assert len(state.a) == len(state.b) == 8


def test_a_starts_as_the_seed_says(tiny: dict[str, Path], mesh: Mesh) -> None:
    state = make(tiny, mesh)
    for p in state.projections:
        a = state.a[p.path].view(state.master)
        assert torch.equal(a, init_a(p.path, rank=3, in_features=p.in_features, seed=5))
        assert a.abs().max() <= p.in_features**-0.5
        assert a.std().item() == pytest.approx((p.in_features * 3) ** -0.5, rel=0.2)
    values = [tuple(state.a[p.path].view(state.master).flatten().tolist()) for p in state.projections]
    assert len(set(values)) == len(values), "no two projections start alike"
