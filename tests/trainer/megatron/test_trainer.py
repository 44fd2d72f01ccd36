"""The Megatron trainer against transformers + PEFT, in fp32, at every layout; and its promises about state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from framework.trainer.megatron.trainer import RECOMPUTE
from tests.tiny_models import VARIANTS
from tests.trainer.megatron.conftest import GRADIENT_KEYS, Reference
from tests.trainer.megatron.scenario import FIVE_STEPS, combine
from tests.trainer.reference import relative_difference

LAYOUTS = ("tp1", "tp2", "tp2_sp")
Layouts = dict[str, list[dict[str, Any]]]


def _tp_size(layout: str) -> int:
    return 1 if layout == "tp1" else 2


def _gradient(ranks: list[dict[str, Any]], tp_size: int) -> dict[str, Tensor]:
    return combine([rank["gradient"] for rank in ranks], tp_size=tp_size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(layout: str, variant: str, by_layout: Layouts, expected: Reference) -> None:
    for rank in by_layout[layout]:
        difference = (rank["logits"][variant] - expected.logits[variant]).abs().max().item()
        assert difference <= 1e-4
        assert difference <= 1e-5, "the tiny models agree to 1e-6; more means that something changed"


@pytest.mark.parametrize("key", GRADIENT_KEYS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_equals_peft(layout: str, key: Any, by_layout: Layouts, expected: Reference) -> None:
    ranks = [rank["gradients"][key] for rank in by_layout[layout]]
    outcome = expected.gradients[key]
    for rank, result in zip(by_layout[layout], ranks, strict=True):
        assert (rank["adapter_logits"][key] - expected.adapter_logits[key]).abs().max() <= 1e-4
        assert result["loss"] == pytest.approx(outcome.loss, rel=1e-5)
        for got, want in zip(result["logprobs"], outcome.logprobs, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for got, want in zip(result["entropy"], outcome.entropy, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    gradient = _gradient(ranks, _tp_size(layout))
    assert relative_difference(gradient, outcome.gradient) <= 1e-5
    for name, want in outcome.gradient.items():
        assert relative_difference({name: gradient[name]}, {name: want}) <= 5e-5
    assert all(any(f".{target}." in name for target in key[1]) for name in gradient)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_optimizer_steps_equal_peft_and_adamw(
    layout: str, variant: str, by_layout: Layouts, expected: Reference
) -> None:
    """rsLoRA, clipping that bites, weight decay; qwen2 starts with B = 0."""
    losses, norms, factors = expected.steps[variant]
    assert min(norms) > FIVE_STEPS.max_grad_norm
    assert len({round(loss, 4) for loss in losses}) == 5
    for rank in by_layout[layout]:
        steps = rank["steps"][variant]
        assert steps["losses"] == pytest.approx(losses, rel=1e-5)
        assert steps["norms"] == pytest.approx(norms, rel=1e-5)
        assert relative_difference(steps["factors"], factors) <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_is_the_same_at_every_layout(variant: str, by_layout: Layouts) -> None:
    first = by_layout["tp1"][0]["fresh"][variant]
    for layout in LAYOUTS:
        for rank in by_layout[layout]:
            assert set(rank["fresh"][variant]) == set(first)
            assert all(torch.equal(rank["fresh"][variant][name], first[name]) for name in first)
    assert all((tensor == 0).all() == ("lora_B" in name) for name, tensor in first.items())


WORLDS = ("tp1", "tp2", "dp2")
Worlds = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def by_world(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> Worlds:
    return {
        "tp1": [one_rank["invariances_tp1"]],
        "tp2": [rank["invariances_tp2"] for rank in two_ranks],
        "dp2": [rank["invariances_dp2"] for rank in two_ranks],
    }


def _loss_and_gradient(world: str, results: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Of the whole batch: replicas' losses are added, tensor-parallel ranks must agree to the last bit."""
    gradient = combine([r["gradient"] for r in results], tp_size=2 if world == "tp2" else 1)
    losses = [r["loss"] for r in results]
    if world == "dp2":
        return sum(losses), gradient
    assert len(set(losses)) == 1
    return losses[0], gradient


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant", "sum"])
def test_packing_microbatches_and_replicas_change_nothing(aggregation: str, world: str, by_world: Worlds) -> None:
    """Three token budgets in three worlds against the largest budget on one rank."""
    loss, gradient = _loss_and_gradient("tp1", [by_world["tp1"][0]["split"][aggregation, 512]])
    counts = set()
    for max_tokens in (30, 46, 512):
        results = [rank["split"][aggregation, max_tokens] for rank in by_world[world]]
        counts |= {r["num_microbatches"] for r in results}
        got_loss, got_gradient = _loss_and_gradient(world, results)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert relative_difference(got_gradient, gradient) <= 1e-5
    assert len(counts) >= 2, "the budgets must cut the batch differently for the test to say anything"


def test_the_loss_is_that_of_peft(by_world: Worlds, expected: Reference) -> None:
    """Anchors the invariances above: the token mean, rsLoRA, qwen3."""
    loss, gradient = _loss_and_gradient("tp1", [by_world["tp1"][0]["split"]["token_mean", 512]])
    assert loss == pytest.approx(expected.rslora.loss, rel=1e-5)
    assert relative_difference(gradient, expected.rslora.gradient) <= 1e-5


@pytest.mark.parametrize("kind", ["recompute", "dropout"])
@pytest.mark.parametrize("world", WORLDS)
def test_recomputing_changes_not_one_bit(world: str, kind: str, by_world: Worlds) -> None:
    """The masks of dropout are drawn again alike."""
    for rank in by_world[world]:
        kept = rank[kind]["none"]
        for mode in RECOMPUTE[1:]:
            again = rank[kind][mode]
            assert again["loss"] == kept["loss"]
            assert all(torch.equal(again["gradient"][name], tensor) for name, tensor in kept["gradient"].items())


def test_dropout_draws_the_same_masks_on_two_ranks(by_world: Worlds) -> None:
    one = _loss_and_gradient("tp1", [by_world["tp1"][0]["dropout"]["none"]])
    two = _loss_and_gradient("tp2", [rank["dropout"]["none"] for rank in by_world["tp2"]])
    plain = _loss_and_gradient("tp1", [by_world["tp1"][0]["recompute"]["none"]])
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert relative_difference(two[1], one[1]) <= 1e-5
    assert relative_difference(one[1], plain[1]) > 0.05, "dropout must do something"


@pytest.mark.parametrize("world", WORLDS)
def test_forward_is_without_dropout_and_equals_training(world: str, by_world: Worlds) -> None:
    for rank in by_world[world]:
        for plain, noisy in zip(rank["forward"]["a"], rank["forward"]["noisy"], strict=True):
            assert plain.tolist() == noisy.tolist()
        for plain, trained in zip(rank["forward"]["a"], rank["recompute"]["none"]["logprobs"], strict=True):
            assert plain.tolist() == trained.tolist()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_ranks_hold_the_same_factors_bit_for_bit_after_five_steps(dtype: str, two_ranks: list[dict[str, Any]]) -> None:
    """With dropout and sequence parallelism; also the losses, so that nothing else can have parted."""
    first, second = (rank[f"replicated_{dtype}"] for rank in two_ranks)
    assert first["losses"] == second["losses"]
    assert first["norms"] == second["norms"]
    assert all(torch.equal(first["factors"][name], second["factors"][name]) for name in first["factors"])
    for path, (a, b) in first["shards"].items():
        other_a, other_b = second["shards"][path]
        row_parallel = path.endswith(("o_proj", "down_proj"))
        assert torch.equal(a, other_a) == (not row_parallel)
        assert torch.equal(b, other_b) == row_parallel
        assert a.dtype == b.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        assert b.abs().max() > 0
