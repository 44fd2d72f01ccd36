"""Chunked vocab-parallel logprobs against plain log_softmax and autograd; and what they never hold at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.distributed import Mesh
from framework.trainer.megatron.logprobs import CHUNK_BYTES, VocabShard, logprobs_and_entropy

POSITIONS, HIDDEN, VOCAB = 37, 4, 53


def shard(weight: Tensor, mesh: Mesh, *, chunk: int) -> VocabShard:
    """Of one rank; ``padded_rows`` is such that ``chunk`` positions are worked on at a time."""
    padded_rows = CHUNK_BYTES // (4 * chunk)
    made = VocabShard(weight=weight, start=0, padded_rows=padded_rows, group=mesh.tp_group, group_size=1)
    assert next(made.chunks(10**6)) == slice(0, chunk)
    return made


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, VOCAB, (POSITIONS,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)], ids=["logprob", "entropy", "both"])
def test_values_and_gradients(chunk: int, temperature: float, a: float, b: float, mesh: Mesh) -> None:
    """Each position weighs differently, so that mixed-up positions show."""
    hidden, weight, targets = problem()
    scale = torch.linspace(0.5, 2.0, POSITIONS, dtype=torch.float64)
    want_hidden = hidden.clone().requires_grad_()
    want = plain(want_hidden, weight, targets, temperature)
    (scale * (a * want[0] + b * want[1])).sum().backward()
    got_hidden = hidden.float().requires_grad_()
    got = logprobs_and_entropy(got_hidden, targets, shard(weight.float(), mesh, chunk=chunk), temperature)
    (scale.float() * (a * got[0] + b * got[1])).sum().backward()
    assert want_hidden.grad is not None
    assert got_hidden.grad is not None
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert (got_hidden.grad - want_hidden.grad).norm() <= 2e-5 * want_hidden.grad.norm()


def test_huge_logits_do_not_overflow(mesh: Mesh) -> None:
    hidden, weight, targets = problem()
    want = plain(hidden * 300, weight, targets, 1.0)
    got = logprobs_and_entropy((hidden * 300).float(), targets, shard(weight.float(), mesh, chunk=5), 1.0)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-3, atol=1e-2)


def test_no_positions(mesh: Mesh) -> None:
    _, weight, targets = problem()
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(hidden, targets[:0], shard(weight.float(), mesh, chunk=5), 1.0)
    (logprobs + entropy).sum().backward()
    assert logprobs.shape == entropy.shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Watches every operation's results: the most elements of one whose last axis is the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.returns and func._schema.returns[0].alias_info is not None:
            return result  # a view: the transposed weight
        for tensor in result if isinstance(result, tuple | list) else (result,):
            made = isinstance(tensor, Tensor) and func is not torch.ops.aten.t.default  # the output layer, transposed
            if made and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_live_for_a_chunk_only(dtype: torch.dtype, mesh: Mesh) -> None:
    """No operation makes more than a chunk's logits, and none are kept: hidden states and targets, log Z, entropy, and
    the logprobs' derivative by the hidden states (and the output layer, which is there anyway)."""
    hidden, weight, targets = problem(dtype)
    hidden.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    part = shard(weight, mesh, chunk=5)
    with LargestTensor(VOCAB) as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logprobs, entropy = logprobs_and_entropy(hidden, targets, part, 0.9)
    shapes = [(POSITIONS, HIDDEN), (VOCAB, HIDDEN), (POSITIONS,), (POSITIONS,), (POSITIONS,), (POSITIONS, HIDDEN)]
    assert [tuple(t.shape) for t in kept] == shapes
    assert seen.elements == 5 * VOCAB
    with LargestTensor(VOCAB) as seen:
        torch.autograd.backward((logprobs.sum() + entropy.sum(),))
    assert seen.elements == 5 * VOCAB


def test_the_default_chunk_of_a_large_vocabulary() -> None:
    """Qwen's 151,936 rows: 41 positions, 24 MiB of float32."""
    part = VocabShard(weight=torch.empty(0), start=0, padded_rows=151936, group=None, group_size=1)  # type: ignore[arg-type]
    sizes = [s.stop - s.start for s in part.chunks(100)]
    assert sizes == [41, 41, 18]
