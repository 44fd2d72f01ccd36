"""Full fine-tuning against transformers, torch.optim.AdamW and plain autograd: every family, one rank and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.device import Device
from framework.distributed import Mesh
from framework.errors import AdapterError
from framework.lora.spec import LoraSpec
from framework.types import Datum
from tests.ranks import run_ranks
from tests.tiny_models import VARIANTS, VOCAB_SIZE
from tests.trainer import reference
from tests.trainer.megatron import base_scenario, scenario

BATCHES = [reference.make_datums(VOCAB_SIZE, seed=seed) for seed in range(5)]


@pytest.fixture(scope="module")
def expected(tiny: dict[str, Path]) -> dict[str, reference.Trained]:
    """What transformers and torch.optim.AdamW make of the same batches."""
    return {
        variant: reference.train_base(
            reference.load(folder), BATCHES, base_scenario.FIVE_STEPS, temperature=scenario.TEMPERATURE
        )
        for variant, folder in tiny.items()
    }


@pytest.fixture(scope="module")
def results(
    tiny: dict[str, Path], mesh: Mesh, device: Device, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """By variant: one rank, two ranks, two ranks with sequence parallelism."""
    ranks = run_ranks(
        "tests.trainer.megatron.base_scenario:on_two_ranks",
        tmp_path_factory.mktemp("base"),
        folders=tiny,
        batches=BATCHES,
    )
    return {
        variant: [
            base_scenario.train(folder, BATCHES, mesh, device, sequence_parallel=False),
            *(rank[variant, split] for rank in ranks for split in (False, True)),
        ]
        for variant, folder in tiny.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_steps_are_those_of_transformers(
    variant: str, results: dict[str, list[dict[str, Any]]], expected: dict[str, reference.Trained]
) -> None:
    want = expected[variant]
    for got in results[variant]:
        assert got["losses"] == pytest.approx(want.losses, abs=1e-4)
        assert got["norms"] == pytest.approx(want.norms, rel=1e-4)
        assert set(got["model"]) == set(want.weights)
        assert relative_change(got["model"], want.weights, want.start) <= 2e-3
        assert (got["after"] - got["before"]).abs().max() > 0.05


def relative_change(got: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest error of any tensor, over how far training moved it."""
    return max(
        float((got[name] - want[name]).norm() / (want[name] - start[name]).norm().clamp(min=1e-8)) for name in want
    )


def test_the_weights_are_written_where_they_are(results: dict[str, list[dict[str, Any]]]) -> None:
    for layouts in results.values():
        for got in layouts:
            assert got["in place"]
            assert got["left over"] == []


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_recomputation_changes_nothing(
    recompute: str, tiny: dict[str, Path], mesh: Mesh, device: Device, results: dict[str, list[dict[str, Any]]]
) -> None:
    got = base_scenario.train(tiny["qwen3"], BATCHES, mesh, device, sequence_parallel=False, recompute=recompute)
    assert got["losses"] == pytest.approx(results["qwen3"][0]["losses"], abs=1e-6)
    assert got["norms"] == pytest.approx(results["qwen3"][0]["norms"], rel=1e-5)


def test_a_resumed_training_is_bitwise_the_one_that_was_not(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    got = base_scenario.resumed(tiny["qwen3"], BATCHES, mesh, device)
    assert all(torch.equal(got["first"][name], got["second"][name]) for name in got["first"])


def test_bf16_weights_are_the_rounded_masters_and_small_steps_are_not_lost(
    tiny: dict[str, Path], mesh: Mesh, device: Device
) -> None:
    """A step far below bf16's resolution moves nothing that is served, 200 of them do."""
    trainer = scenario.open_trainer(tiny["llama"], mesh, device, dtype=torch.bfloat16)
    trainer.train_base("policy")
    name = "model.layers.0.mlp.down_proj.weight"
    start = trainer.base_weights()[name].detach().clone()
    batch = scenario.make_batch(BATCHES[0], trainer)
    tiny_step = base_scenario.AdamParams(learning_rate=1e-6)
    for _ in range(200):
        trainer.forward_backward("policy", batch, scenario.policy_loss)
        trainer.optim_step("policy", tiny_step)
    state = trainer.state_dict("policy")
    masters = state["master"]
    moved = trainer.base_weights()[name].detach()
    assert (moved != start).float().mean() > 0.05
    assert (moved.float() - start.float()).abs().max() <= 2e-4 + start.abs().max() * 2**-8
    assert masters.dtype is torch.float32
    assert any(torch.equal(moved.flatten(), part.bfloat16()) for part in windows(masters, moved.numel(), trainer, name))


def windows(masters: Tensor, size: int, trainer: Any, name: str) -> list[Tensor]:
    """Where the tensor's masters are: after all that come before it in the state's order."""
    place = trainer._states["policy"]._places[name]
    assert place.stop - place.start == size
    return [masters[place]]


def test_nothing_stands_beside_a_base_model_under_training(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    trainer = scenario.open_trainer(tiny["llama"], mesh, device)
    batch = scenario.make_batch(BATCHES[0], trainer)
    trainer.train_base("policy")
    with pytest.raises(AdapterError, match=r"an adapter needs the base model as it was.*lora=none"):
        trainer.add_adapter("a", LoraSpec(), seed=0)
    with pytest.raises(AdapterError, match="a forward pass without an adapter needs the base model as it was"):
        trainer.forward(None, batch)
    with pytest.raises(AdapterError, match="not an adapter"):
        trainer.adapter_shards("policy")
    assert trainer.adapters() == {}
    other = scenario.open_trainer(tiny["llama"], mesh, device)
    other.add_adapter("a", LoraSpec(), seed=0)
    with pytest.raises(AdapterError, match=r"cannot be trained beside \['a'\]"):
        other.train_base("policy")
    with pytest.raises(AdapterError, match="'a' is an adapter"):
        other.export_base("a")


def test_a_training_that_was_given_up_leaves_the_model_as_it_is_and_can_begin_again(
    tiny: dict[str, Path], mesh: Mesh, device: Device
) -> None:
    trainer = scenario.open_trainer(tiny["llama"], mesh, device)
    before = trainer.logits(None, scenario.SEQUENCE)
    batch = scenario.make_batch(BATCHES[0], trainer)
    losses = []
    for _ in range(2):
        trainer.train_base("policy")
        losses.append(trainer.forward_backward("policy", batch, scenario.policy_loss).loss)
        trainer.remove_adapter("policy")
        assert not any(tensor.requires_grad for tensor in trainer.base_weights().values())
    assert losses[0] == losses[1]
    assert torch.equal(trainer.logits(None, scenario.SEQUENCE), before)
    trainer.add_adapter("a", LoraSpec(), seed=0)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    trainer = scenario.open_trainer(tiny["llama"], mesh, device)
    trainer.train_base("policy")
    before = dict(trainer.export_base("policy"))
    bad = [
        Datum(
            token_ids=datum.token_ids,
            loss_mask=datum.loss_mask,
            fields={"advantages": (float("inf"),) * len(datum.token_ids)},
        )
        for datum in BATCHES[0]
    ]
    trainer.forward_backward("policy", scenario.make_batch(bad, trainer), scenario.policy_loss)
    assert not torch.isfinite(torch.tensor(trainer.optim_step("policy", base_scenario.FIVE_STEPS).grad_norm))
    after = trainer.export_base("policy")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_of_another_size_is_refused(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    trainer = scenario.open_trainer(tiny["llama"], mesh, device)
    trainer.train_base("policy")
    state = trainer.state_dict("policy")
    with pytest.raises(AdapterError, match=r"saved master has 3 elements.*tensor_parallel_size"):
        trainer.load_state_dict("policy", {**state, "master": torch.zeros(3)})
    with pytest.raises(AdapterError, match=r"lacks \['exp_avg'\]"):
        trainer.load_state_dict("policy", {key: value for key, value in state.items() if key != "exp_avg"})
