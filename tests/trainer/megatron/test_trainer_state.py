"""What the trainer promises about an adapter's state: what a call adds, what a failure leaves, what survives a trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.algorithms.base import LossInputs, LossOutput, Metric
from framework.batching import Batch, aggregate, pack, shift
from framework.device import Device
from framework.distributed import Mesh
from framework.errors import AdapterError, ConfigError, DataError
from framework.lora.spec import LoraSpec
from framework.trainer.megatron.trainer import MegatronTrainer
from framework.types import AdamParams, Datum
from tests.tiny_models import VOCAB_SIZE
from tests.trainer.megatron.scenario import (
    FIVE_STEPS,
    add,
    exported,
    make_batch,
    open_trainer,
    partial_gradient,
    policy_loss,
)
from tests.trainer.megatron.test_logprobs import LargestTensor
from tests.trainer.reference import make_datums, make_factors, relative_difference

SPEC = LoraSpec(rank=4, alpha=10.0)


@pytest.fixture(scope="module")
def shared(tiny: dict[str, Path], mesh: Mesh, device: Device) -> MegatronTrainer:
    return open_trainer(tiny["llama"], mesh, device)


@pytest.fixture
def trainer(shared: MegatronTrainer, bases: dict[str, Any]) -> MegatronTrainer:
    """With one adapter ``a`` that does something."""
    for name in list(shared.adapters()):
        shared.remove_adapter(name)
    add(shared, "a", SPEC, make_factors(bases["llama"], SPEC))
    return shared


@pytest.fixture(scope="module")
def datums() -> list[Datum]:
    return make_datums(VOCAB_SIZE)


def snapshot(trainer: MegatronTrainer, name: str = "a") -> dict[str, list[float]]:
    return {key: tensor.tolist() for key, tensor in trainer.state_dict(name).items()}


def test_gradients_accumulate_over_calls(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    whole = make_batch(datums, trainer, max_tokens=512)
    trainer.forward_backward("a", whole, policy_loss)
    together = partial_gradient(trainer, "a")
    trainer.zero_grad("a")
    weighted = aggregate([shift(d) for d in datums], "token_mean")
    total = 0.0
    for part in (weighted[:2], weighted[2:]):
        total += trainer.forward_backward("a", pack(part, max_tokens=512, temperature=0.7), policy_loss).loss
    assert relative_difference(partial_gradient(trainer, "a"), together) <= 1e-5
    assert total == pytest.approx(trainer.forward_backward("a", whole, policy_loss).loss, rel=1e-5)


def test_results_come_back_in_the_order_of_the_datums(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    batch = make_batch(datums, trainer, max_tokens=30)
    assert [m.datum_ids for m in batch.microbatches] != [tuple(range(len(datums)))]
    result = trainer.forward("a", batch)
    for index, datum in enumerate(datums):
        alone = trainer.forward("a", make_batch([datum], trainer))
        np.testing.assert_allclose(result.logprobs[index], alone.logprobs[0], atol=1e-5)
        np.testing.assert_allclose(result.entropy[index], alone.entropy[0], atol=1e-5)
        assert len(result.logprobs[index]) == sum(datum.loss_mask)


def test_a_batch_with_nothing_to_score(trainer: MegatronTrainer) -> None:
    silent = Datum(token_ids=(1, 2, 3), loss_mask=(False,) * 3, fields={"advantages": (0.0,) * 3})
    result = trainer.forward_backward("a", make_batch([silent], trainer), policy_loss)
    assert result.loss == 0.0
    assert [len(x) for x in result.result.logprobs] == [0]
    assert all(tensor.abs().max() == 0 for tensor in partial_gradient(trainer, "a").values())


def test_metrics_are_added_over_microbatches(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    def counted(inputs: LossInputs) -> LossOutput:
        metric = Metric(sum=inputs.advantages.sum(), count=float(len(inputs.logprobs)))
        return LossOutput(per_token=-inputs.logprobs, metrics={"loss/advantage": metric})

    batch = make_batch(datums, trainer, max_tokens=30)
    assert len(batch.microbatches) > 1
    metric = trainer.forward_backward("a", batch, counted).metrics["loss/advantage"]
    chosen = [a for d in datums for a, m in zip(d.fields["advantages"], d.loss_mask, strict=True) if m]
    assert float(metric.sum) == pytest.approx(sum(chosen), abs=1e-5)
    assert float(metric.count) == len(chosen)


class Failing:
    """A loss that raises at its second microbatch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: LossInputs) -> LossOutput:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("no loss today")
        return policy_loss(inputs)


def test_a_call_that_fails_adds_nothing(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    batch = make_batch(datums, trainer, max_tokens=30)
    trainer.forward_backward("a", batch, policy_loss)
    before = snapshot(trainer)
    with pytest.raises(RuntimeError, match="no loss today"):
        trainer.forward_backward("a", batch, Failing())
    assert snapshot(trainer) == before
    base = trainer.forward(None, batch).logprobs[1].tolist()
    assert base != trainer.forward("a", batch).logprobs[1].tolist(), "the adapter was switched off again"


def test_the_gradient_of_a_is_zero_while_b_is_zero(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    trainer.add_adapter("fresh", SPEC, seed=1)
    trainer.forward_backward("fresh", make_batch(datums, trainer), policy_loss)
    for name, gradient in partial_gradient(trainer, "fresh").items():
        assert (gradient.abs().max().item() == 0.0) == ("lora_A" in name), name


def test_a_fresh_adapter_is_the_base_model(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    trainer.add_adapter("fresh", SPEC, seed=1)
    batch = make_batch(datums, trainer)
    for base, fresh in zip(
        trainer.forward(None, batch).logprobs, trainer.forward("fresh", batch).logprobs, strict=True
    ):
        assert base.tolist() == fresh.tolist()


def test_two_adapters_do_not_touch_each_other(trainer: MegatronTrainer, datums: list[Datum], bases: Any) -> None:
    """Another rank, other targets, dropout in both: interleaved equals each alone, bit for bit."""
    specs = {
        "p": LoraSpec(rank=4, alpha=10.0, dropout=0.2),
        "q": LoraSpec(rank=7, alpha=3.0, targets=("k_proj", "down_proj"), dropout=0.1, use_rslora=True),
    }
    factors = {name: make_factors(bases["llama"], spec, seed=len(name)) for name, spec in specs.items()}
    batch = make_batch(datums, trainer)

    def train(names: tuple[str, ...]) -> dict[str, Any]:
        for name in names:
            add(trainer, name, specs[name], factors[name])
        for _ in range(3):
            for name in names:
                trainer.forward_backward(name, batch, policy_loss)
            for name in names:
                trainer.optim_step(name, FIVE_STEPS)
        states = {name: snapshot(trainer, name) for name in names}
        for name in names:
            trainer.remove_adapter(name)
        return states

    together = train(("p", "q"))
    assert together == {**train(("p",)), **train(("q",))}


def test_state_survives_a_trip_bit_for_bit(trainer: MegatronTrainer, datums: list[Datum], bases: Any) -> None:
    """Resumed amid accumulation, with dropout: the continuation is the same to the last bit."""
    spec = LoraSpec(rank=4, alpha=10.0, dropout=0.3)
    batch = make_batch(datums, trainer, max_tokens=30)
    add(trainer, "d", spec, make_factors(bases["llama"], spec))
    for _ in range(2):
        trainer.forward_backward("d", batch, policy_loss)
        trainer.optim_step("d", FIVE_STEPS)
    trainer.forward_backward("d", batch, policy_loss)
    saved = trainer.state_dict("d")
    kept = {key: tensor.clone() for key, tensor in saved.items()}

    def go_on() -> tuple[list[float], dict[str, list[float]]]:
        losses = [trainer.forward_backward("d", batch, policy_loss).loss]
        trainer.optim_step("d", FIVE_STEPS)
        losses.append(trainer.forward_backward("d", batch, policy_loss).loss)
        return losses, snapshot(trainer, "d")

    straight = go_on()
    assert all(torch.equal(saved[key], kept[key]) for key in kept), "the saved state is a copy"
    trainer.remove_adapter("d")
    trainer.add_adapter("d", spec, seed=3)
    trainer.load_state_dict("d", saved)
    assert all(torch.equal(trainer.state_dict("d")[key], kept[key]) for key in kept)
    assert go_on() == straight


def test_a_state_of_another_shape_is_refused_whole(trainer: MegatronTrainer) -> None:
    trainer.add_adapter("other", LoraSpec(rank=5), seed=1)
    before = snapshot(trainer)
    state = trainer.state_dict("a")
    with pytest.raises(AdapterError, match=r"saved master has shape \(\d+,\), this one \(\d+,\).*lora\.\*"):
        trainer.load_state_dict("a", trainer.state_dict("other"))
    with pytest.raises(AdapterError, match="saved exp_avg_sq has shape"):
        trainer.load_state_dict(
            "a", {**trainer.state_dict("a"), "master": state["master"] + 1, "exp_avg_sq": torch.ones(1)}
        )
    with pytest.raises(AdapterError, match=r"saved state lacks \['exp_avg', 'step'\]"):
        trainer.load_state_dict("a", {k: v for k, v in state.items() if k not in ("exp_avg", "step")})
    assert snapshot(trainer) == before


def test_export_and_import_are_inverse(trainer: MegatronTrainer, datums: list[Datum], bases: Any) -> None:
    factors = make_factors(bases["llama"], SPEC)
    got = trainer.export_adapter("a")
    assert {name: value.tolist() for name, value in got.items()} == {k: v.tolist() for k, v in factors.items()}
    batch = make_batch(datums, trainer)
    trainer.forward_backward("a", batch, policy_loss)
    trainer.optim_step("a", FIVE_STEPS)
    logprobs = trainer.forward("a", batch).logprobs
    trained = trainer.export_adapter("a")
    trainer.add_adapter("b", SPEC, seed=99)
    trainer.import_adapter("b", trained)
    assert [x.tolist() for x in trainer.forward("b", batch).logprobs] == [x.tolist() for x in logprobs]
    state = trainer.state_dict("b")
    assert state["step"] == 0, "the optimizer starts fresh"
    assert state["exp_avg"].abs().max() == 0
    trained[next(iter(trained))][:] = 0.0
    assert trainer.export_adapter("b")[next(iter(trained))].any(), "what was imported is a copy"


Change = Callable[[dict[str, Any]], None]
FIRST = "model.layers.0.self_attn.q_proj.lora_A.weight"


def _transpose(tensors: dict[str, Any]) -> None:
    tensors[FIRST] = tensors[FIRST].T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), rf"missing or unknown: \['{FIRST}'\] \(1 in all\)"),
        (lambda t: t.update(extra=t[FIRST]), r"missing or unknown: \['extra'\]"),
        (_transpose, rf"{FIRST} has shape \(64, 4\), must be \(4, 64\)"),
        (lambda t: t.update({FIRST: t[FIRST][:2]}), r"has shape \(2, 64\), must be \(4, 64\)"),
    ],
    ids=["missing", "unknown", "transposed", "another rank"],
)
def test_an_import_that_does_not_fit_changes_nothing(trainer: MegatronTrainer, change: Change, message: str) -> None:
    before = snapshot(trainer)
    tensors = {name: value + 1 for name, value in trainer.export_adapter("a").items()}
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        trainer.import_adapter("a", tensors)
    assert snapshot(trainer) == before


def test_only_scored_positions_reach_the_vocabulary(trainer: MegatronTrainer) -> None:
    """Of 400 tokens 5 are scored: no operation, forward or backward, makes logits of more than those."""
    datum = Datum(
        token_ids=tuple(range(401)), loss_mask=(False,) * 396 + (True,) * 5, fields={"advantages": (1.0,) * 401}
    )
    batch = make_batch([datum], trainer, max_tokens=400)
    with LargestTensor(VOCAB_SIZE) as seen:
        trainer.forward_backward("a", batch, policy_loss)
    assert seen.elements == VOCAB_SIZE * 5
    with LargestTensor(VOCAB_SIZE) as seen:
        trainer.logits("a", batch.microbatches[0].input_ids)
    assert seen.elements == VOCAB_SIZE * 400, "whole logits would have been seen"


def test_names_are_checked(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    batch = make_batch(datums, trainer)
    with pytest.raises(AdapterError, match="already has an adapter named 'a'"):
        trainer.add_adapter("a", SPEC, seed=0)
    with pytest.raises(AdapterError, match=r"no adapter named 'x'; it has \['a'\]"):
        trainer.forward("x", batch)
    with pytest.raises(AdapterError, match="no adapter named 'x'"):
        trainer.remove_adapter("x")
    with pytest.raises(AdapterError, match=r"lora.rank=65 exceeds the model's hidden size 64"):
        trainer.add_adapter("wide", LoraSpec(rank=65), seed=0)
    assert list(trainer.adapters()) == ["a"]


def tokens(ids: list[int], trainer: MegatronTrainer) -> Batch:
    datum = Datum(token_ids=tuple(ids), loss_mask=(False, *[True] * (len(ids) - 1)))
    return make_batch([datum], trainer, max_tokens=10_000)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 515], "target_ids has a token id 515, this model's vocabulary is 0 to 514"),
        ([1, 600, 2], "input_ids has a token id 600, this model's vocabulary is 0 to 514"),
        ([1, -1, 2], "input_ids has a token id -1"),
        ([3] * 2050, "a sequence of 2049 tokens exceeds this model's context of 2048"),
    ],
)
def test_tokens_the_model_does_not_know_are_refused(ids: list[int], message: str, trainer: MegatronTrainer) -> None:
    """515 is a padding row of the embedding: without a check it would train on zeros."""
    with pytest.raises(DataError, match=message):
        trainer.forward("a", tokens(ids, trainer))


def test_a_gradient_that_is_not_finite_makes_no_step(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    batch = make_batch(datums, trainer)
    trainer.forward_backward("a", batch, policy_loss)
    trainer.optim_step("a", FIVE_STEPS)
    before = snapshot(trainer)
    trainer.forward_backward("a", batch, lambda i: LossOutput(per_token=i.logprobs * float("nan")))
    result = trainer.optim_step("a", FIVE_STEPS)
    assert (np.isnan(result.grad_norm), result.step) == (True, 1)
    after = snapshot(trainer)
    assert after.pop("num_microbatches") != before.pop("num_microbatches")
    assert after == before
    trainer.forward_backward("a", batch, policy_loss)
    assert np.isfinite(trainer.optim_step("a", FIVE_STEPS).grad_norm), "the adapter is still usable"


def test_a_loss_of_another_shape_is_refused(trainer: MegatronTrainer, datums: list[Datum]) -> None:
    """``[M, 1]`` would broadcast with the weights to ``[M, M]``."""
    with pytest.raises(ConfigError, match=r"per_token of shape \(\d+, 1\); it must have one entry per scored token"):
        trainer.forward_backward("a", make_batch(datums, trainer), lambda i: LossOutput(per_token=i.logprobs[:, None]))


def test_an_unknown_recompute_mode_is_refused(tiny: dict[str, Path], mesh: Mesh, device: Device) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.recompute='half': must be one of \['none', 'mlp', 'all_but_attention', 'full'\]"
    ):
        open_trainer(tiny["llama"], mesh, device, recompute="half")


def test_shards_are_what_the_forward_computes_with(trainer: MegatronTrainer) -> None:
    """The scale is in b; they follow the optimizer step."""
    whole = exported(trainer, "a")
    for _ in range(2):
        for path, shard in trainer.adapter_shards("a").items():
            assert torch.equal(shard.a, whole[f"{path}.lora_A.weight"])
            assert torch.equal(shard.b, whole[f"{path}.lora_B.weight"] * 2.5)
        trainer.optim_step("a", AdamParams(learning_rate=0.1, weight_decay=0.5))
        whole = exported(trainer, "a")
