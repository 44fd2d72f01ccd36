"""A row's product has the same bits in every batch, also where the library takes over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

SHAPES = {
    "smollm2-135m": ((576, 960), (576, 1152), (576, 576), (576, 3072), (1536, 576)),
    "qwen3-0.6b": ((1024, 4096), (2048, 1088), (1024, 6272), (3072, 1088), (1024, 96)),
    "qwen3-4b": ((2560, 6144), (4096, 2624), (2560, 19584), (9728, 2624)),
    "not multiples of a tile": ((200, 88), (576, 966)),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=torch.accelerator.current_accelerator(), dtype=torch.float32).bfloat16()


@pytest.mark.parametrize("model", SHAPES)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_among_the_librarys(model: str) -> None:
    from framework.kernels.product import LARGE, product

    for inner, size in SHAPES[model]:
        first = -(-LARGE // size)  # rows with which the library begins
        x, weight = draw(max(first, 8192), inner), 0.05 * draw(size, inner)
        whole = product(x, weight)
        if size % 8 == 0:
            assert torch.equal(whole, torch.nn.functional.linear(x, weight))
        for count in (1, 2, 17, 64, 128, 200, 2000, first - 1, first):
            assert torch.equal(product(x[:count], weight), whole[:count]), (inner, size, count)


@pytest.mark.parametrize(("inner", "size"), [(256, 285), (576, 49152), (1024, 151936)])
def test_unrounded_a_row_has_the_same_bits_in_every_batch(inner: int, size: int) -> None:
    from framework.kernels.product import product

    x, weight = draw(700, inner), 0.05 * draw(size, inner)
    whole = product(x, weight, out_dtype=torch.float32)
    assert torch.equal(product(x, weight), whole.bfloat16())
    for count in (1, 8, 64, 85, 128, 300):
        assert torch.equal(product(x[:count], weight, out_dtype=torch.float32), whole[:count]), count


def test_the_product_is_right_and_the_bias_comes_after_it() -> None:
    from framework.kernels.product import product

    x, weight, bias = draw(50, 200), draw(88, 200), draw(88)
    want = x.double() @ weight.double().t()
    got = product(x, weight)
    assert float((got.double() - want).abs().max()) <= 2**-8 * float(want.abs().max())
    assert torch.equal(product(x, weight, bias), got + bias)


def test_its_gradients_are_the_plain_products() -> None:
    from framework.trainer.megatron.kernels import EXACT

    inputs = [draw(50, 96), draw(64, 96), draw(64)]
    cotangent = draw(50, 64)
    grads = []
    for function in (EXACT.product, torch.nn.functional.linear):
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves).backward(cotangent)
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
