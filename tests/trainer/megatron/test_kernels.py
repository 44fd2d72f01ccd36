"""Each Triton kernel against the plain function in float64; in bfloat16 no further from it than plain bfloat16 is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.device import open_device
from framework.engine.vllm.attention import open_attention
from framework.trainer.megatron import cudnn_backward, flash
from framework.trainer.megatron.attention import attend, backward_kernel, plan
from framework.trainer.megatron.pointwise import PLAIN, Heads, Pointwise, VocabGradient

pytestmark = pytest.mark.gpu


@pytest.fixture
def kernels() -> Pointwise:
    from framework.trainer.megatron.kernels import KERNELS

    return KERNELS


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=torch.accelerator.current_accelerator(), dtype=torch.float64).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def results(function: Callable[..., Any], inputs: Sequence[Any], seed: int = 1) -> list[Tensor]:
    """Outputs, then gradients of the first input for a fixed random cotangent."""
    x = inputs[0].detach().clone().requires_grad_()
    out = function(x, *inputs[1:])
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    torch.autograd.backward(outs, cotangents)
    assert x.grad is not None
    return [*(o.detach() for o in outs), x.grad]


def assert_as_good_as_plain(
    plain: Callable[..., Any], fast: Callable[..., Any], inputs: Sequence[Any], dtype: torch.dtype
) -> None:
    exact = results(plain, [x.double() if isinstance(x, Tensor) else x for x in inputs])
    fast_results, plain_results = results(fast, inputs), results(plain, inputs)
    for truth, ours, theirs in zip(exact, fast_results, plain_results, strict=True):
        assert ours.dtype is dtype
        assert error(ours, truth) <= max(1.5 * error(theirs, truth), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [128, 576, 2560, 4096])
def test_rms_norm(size: int, dtype: torch.dtype, kernels: Pointwise) -> None:
    inputs = [draw(300, size, dtype=dtype), draw(size, dtype=dtype), 1e-5]
    assert_as_good_as_plain(PLAIN.rms_norm, kernels.rms_norm, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 1536, 9728])
def test_swiglu(size: int, dtype: torch.dtype, kernels: Pointwise) -> None:
    assert_as_good_as_plain(PLAIN.swiglu, kernels.swiglu, [draw(300, 2 * size, dtype=dtype)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_norm_and_rotate(dim: int, norm: bool, dtype: torch.dtype, kernels: Pointwise) -> None:
    heads = Heads(query=6, kv=2, dim=dim, eps=1e-6)
    angles = draw(257, dim // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    weights = [draw(dim, dtype=dtype) if norm else None for _ in range(2)]
    tables = [torch.cat([cos, cos], -1)[:, None].to(dtype), torch.cat([-sin, sin], -1)[:, None].to(dtype)]
    assert_as_good_as_plain(
        PLAIN.norm_and_rotate,
        kernels.norm_and_rotate,
        [draw(257, 10 * dim, dtype=dtype), *weights, *tables, heads],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vocabulary(temperature: float, dtype: torch.dtype, kernels: Pointwise) -> None:
    rows, n = 50003, 70
    logits = 3 * draw(n, rows, dtype=dtype)
    targets = torch.randint(-100, rows + 100, (n,), device=logits.device)
    want, got = (f.vocab_stats(logits, targets, temperature) for f in (PLAIN, kernels))
    for field in ("top", "total", "weighted", "picked"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=2e-5, atol=2e-4)
    log_z = want.top + want.total.log()
    parts = VocabGradient(
        log_z=log_z,
        entropy=log_z - want.weighted / want.total,
        grad_logprobs=draw(n, dtype=torch.float32),
        grad_entropy=draw(n, dtype=torch.float32),
    )
    wanted = PLAIN.vocab_gradient(logits, targets, temperature, parts, logits.dtype)
    assert error(kernels.vocab_gradient(logits.clone(), targets, temperature, parts, logits.dtype), wanted) <= (
        1e-5 if dtype is torch.float32 else 4e-3
    )


@pytest.mark.parametrize("size", [576, 2560])
def test_a_norm_has_the_same_bits_behind_a_sum_and_for_any_number_of_rows(size: int) -> None:
    from framework.kernels.rms_norm import add_rms_norm, rms_norm

    x, residual, weight = (draw(*shape, dtype=torch.bfloat16) for shape in ((300, size), (300, size), (size,)))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))
    for row in (0, 7, 299):
        alone, _ = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, 1e-5)
        assert torch.equal(alone[0], normed[row])


@pytest.mark.parametrize("of", ["torch", "the engine"])
@pytest.mark.parametrize("lengths", [(300,), (1, 7, 128, 129, 64, 1), (64, 64)], ids=str)
@pytest.mark.parametrize(("query", "kv", "dim"), [(4, 4, 64), (9, 3, 64), (32, 8, 128), (4, 1, 256)])
def test_packed_attention(lengths: tuple[int, ...], query: int, kv: int, dim: int, of: str) -> None:
    """The device's kernels, forward and backward, against dense attention by buckets in float64."""
    kernel = open_attention(open_device("auto", local_rank=0)) if of == "the engine" else None
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (
        draw(total, query, dim, dtype=torch.bfloat16),
        *(draw(total, kv, dim, dtype=torch.bfloat16) for _ in range(2)),
    )
    positions, frequencies = (
        torch.zeros(total, dtype=torch.int64, device=q.device),
        torch.ones(dim // 2, device=q.device),
    )
    common = (positions, offsets, max(lengths), frequencies)
    backward = backward_kernel(dim, transformer_engine=cudnn_backward.load())
    plans = [
        plan(*common, dtype=q.dtype, varlen=True, kernel=kernel, backward=backward),
        plan(*common, dtype=q.dtype, varlen=False),
    ]
    for place in range(3):
        order = [(q, k, v)[place], *(x for i, x in enumerate((q, k, v)) if i != place)]

        def run(first: Tensor, *rest: Tensor, place: int = place, which: int = 0) -> Tensor:
            tensors = list(rest)
            tensors.insert(place, first)
            return attend(*tensors, plans[which])  # type: ignore[call-arg, arg-type]

        got = results(lambda *x, run=run: run(*x, which=0), order)
        want = results(lambda *x, run=run: run(*x, which=1), [x.double() for x in order])
        for ours, theirs in zip(got, want, strict=True):
            assert error(ours, theirs) <= 1e-2


@pytest.mark.skipif(not cudnn_backward.is_installed(), reason="Transformer Engine is not installed")
@pytest.mark.parametrize("lengths", [(300,), (1, 7, 128, 129, 64, 1), (64, 64), (1024,) * 4], ids=str)
@pytest.mark.parametrize(("query", "kv", "dim"), [(4, 4, 64), (9, 3, 64), (16, 8, 128), (32, 8, 128)])
def test_both_backward_kernels_take_what_the_engine_leaves(
    lengths: tuple[int, ...], query: int, kv: int, dim: int
) -> None:
    assert cudnn_backward.load()
    kernel = open_attention(open_device("auto", local_rank=0))
    total = sum(lengths)
    q, grad = (draw(total, query, dim, dtype=torch.bfloat16) for _ in range(2))
    k, v = (draw(total, kv, dim, dtype=torch.bfloat16) for _ in range(2))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    out, lse = kernel(q, k, v, ends, max(lengths))
    cudnn, torchs = (
        module.attention_backward(grad, q, k, v, out, lse, ends, max(lengths)) for module in (cudnn_backward, flash)
    )
    for ours, theirs in zip(cudnn, torchs, strict=True):
        assert error(ours, theirs) <= 6e-3
