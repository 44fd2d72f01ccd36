"""The fused LoRA path's kernel against float64, and what it replaces in vLLM. Holds for vllm 0.26.0 on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigError

pytestmark = pytest.mark.gpu

SHAPES = {
    "qkv of grouped heads": (576, (576, 192, 192)),
    "gate and up": (128, (320, 320)),
    "one slice, rows no multiple of a block": (96, (200,)),
}


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(*shape, generator=generator)
    return values.to(device=torch.accelerator.current_accelerator(), dtype=torch.bfloat16)


def reference(full: Tensor, b: list[Tensor], slot_of: Tensor) -> Tensor:
    """Of the rounded product, u included, in float64."""
    sizes = [part.shape[2] for part in b]
    slots, rank = b[0].shape[0], b[0].shape[3]
    y, u = full.double().split([sum(sizes), len(b) * slots * rank], dim=1)
    u = u.unflatten(1, (len(b), slots, rank))
    parts = []
    for index, part in enumerate(y.split(sizes, dim=1)):
        delta = torch.zeros_like(part)
        for slot in range(slots):
            delta += (slot_of == slot)[:, None] * (u[:, index, slot] @ b[index][slot, 0].double().t())
        parts.append(part + delta)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 31, 128, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_gets_its_own_slots_delta_rounded_once(shape: str, tokens: int, rank: int) -> None:
    from framework.engine.vllm.fused_lora import expand

    _, sizes = SHAPES[shape]
    slots = 3
    b = [draw(slots, 1, size, rank) for size in sizes]
    full = draw(tokens, sum(sizes) + len(sizes) * slots * rank)
    mixed = torch.arange(tokens) % (slots + 1) - 1
    for slot_of in (mixed, torch.full_like(mixed, 1), torch.full_like(mixed, -1)):
        on_device = slot_of.to(device=full.device, dtype=torch.int32)
        got, want = expand(full, b, on_device), reference(full, b, on_device)
        assert got.dtype is torch.bfloat16
        assert got.is_contiguous()
        assert float((got.double() - want).abs().max()) <= 2**-8 * float(want.abs().max())
        if (slot_of == -1).all():
            assert torch.equal(got, full[:, : sum(sizes)])


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_the_trainer_adds_the_same_bits(rank: int) -> None:
    from framework.engine.vllm.fused_lora import expand
    from framework.trainer.megatron.kernels import add_delta

    sizes = (576, 192, 192)
    b = [draw(1, 1, size, rank) for size in sizes]
    full = draw(300, sum(sizes) + len(sizes) * rank)
    slot_of = torch.zeros(len(full), dtype=torch.int32, device=full.device)
    y, u = (x.clone() for x in full.split([sum(sizes), len(sizes) * rank], dim=1))
    for number, part in enumerate(y.split(sizes, dim=1)):
        add_delta(part, u[:, number * rank : (number + 1) * rank], b[number][0, 0])
    assert torch.equal(y, expand(full, b, slot_of))


def test_without_adapters_it_is_the_base_product() -> None:
    from framework.engine.vllm.fused_lora import linear_with_slots

    x, extended, b = draw(16, 96), draw(200 + 64, 96), [draw(2, 1, 200, 32)]
    slot_of = torch.full((16,), -1, dtype=torch.int32, device=x.device)
    for nobody, exact in ((True, False), (False, False), (True, True), (False, True)):
        got = linear_with_slots(x, extended, b, slot_of, torch.tensor([nobody]), exact)
        assert torch.allclose(got, torch.nn.functional.linear(x, extended[:200]), rtol=2**-7, atol=2**-7)


def test_only_wide_enough_linears_with_adapters_and_without_bias_are_extended() -> None:
    from framework.engine.vllm import fused_lora

    def create(method: Any, layer: Any, width: int, parts: list[int], *others: Any, **named: Any) -> None:
        layer.weight = torch.nn.Parameter(torch.ones(sum(parts), width), requires_grad=False)

    extending = fused_lora._extending(create, ("o_proj",), 2, 8, exact=False)
    for prefix, rows, has_bias, extended in (
        ("model.layers.0.self_attn.o_proj", 64, False, True),
        ("model.layers.0.self_attn.o_proj", 63, False, False),
        ("model.layers.0.self_attn.o_proj", 64, True, False),
        ("model.layers.0.mlp.down_proj", 64, False, False),
    ):
        layer = SimpleNamespace(prefix=prefix, has_bias=has_bias)
        extending(None, layer, input_size_per_partition=5, output_partition_sizes=[rows])
        assert hasattr(layer, fused_lora.EXTENDED) is extended
        assert layer.weight.shape == (rows, 5)
        if extended:
            assert layer.weight.data_ptr() == getattr(layer, fused_lora.EXTENDED).data_ptr()
            assert getattr(layer, fused_lora.EXTENDED).shape == (64 + 16, 5)


@pytest.mark.parametrize(
    ("rows", "has_bias", "message"),
    [(64, True, "o_proj has a bias"), (63, False, r"1 x 2 x 8 rows, the layer 63.*engine.max_adapters=2")],
)
def test_exact_a_linear_that_would_keep_vllms_kernels_is_refused(rows: int, has_bias: bool, message: str) -> None:
    from framework.engine.vllm import fused_lora

    extending = fused_lora._extending(lambda *args, **named: None, ("o_proj",), 2, 8, exact=True)
    layer = SimpleNamespace(prefix="model.layers.0.self_attn.o_proj", has_bias=has_bias)
    with pytest.raises(ConfigError, match=f"numerics=exact: .*{message}"):
        extending(None, layer, input_size_per_partition=5, output_partition_sizes=[rows])


def test_a_second_engine_of_the_process_replaces_vllms_methods_and_not_ours() -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from framework.engine.vllm import fused_lora

    fused_lora.install(("o_proj",), slots=2, rank=8, exact=False)
    first: Any = vars(UnquantizedLinearMethod)["create_weights"]
    fused_lora.install(("o_proj",), slots=4, rank=8, exact=True)
    second: Any = vars(UnquantizedLinearMethod)["create_weights"]
    assert first is not second
    assert first.replaces is second.replaces
