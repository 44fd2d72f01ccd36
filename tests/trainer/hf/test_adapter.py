"""One adapter's masters, working copy and optimizer state, through the reference trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.algorithms.base import LossOutput
from framework.errors import AdapterError, CheckpointError
from framework.lora.spec import LoraSpec
from framework.trainer.base import Trainer
from framework.types import AdamParams
from tests.trainer.hf.small import ADAM, batch_of, datums, policy_gradient, state_bytes, trainer_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_the_masters_with_the_scale_in_b_and_what_the_forward_uses(
    folders: Callable[[str], Path], dtype: torch.dtype
) -> None:
    trainer = trainer_of(folders("llama"), dtype)
    spec = LoraSpec(rank=4, alpha=7.0, targets=("v_proj", "down_proj"))
    trainer.add_adapter("policy", spec, seed=1)
    trainer.forward_backward("policy", batch_of(datums()), policy_gradient)
    trainer.optim_step("policy", ADAM)
    exported, shards = trainer.export_adapter("policy"), trainer.adapter_shards("policy")
    assert list(shards) == [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.v_proj", "mlp.down_proj")]
    for path, shard in shards.items():
        assert shard.a.dtype == shard.b.dtype == dtype
        assert torch.equal(shard.a, torch.from_numpy(exported[f"{path}.lora_A.weight"]).to(dtype))
        assert torch.equal(shard.b, (1.75 * torch.from_numpy(exported[f"{path}.lora_B.weight"])).to(dtype))
    before = trainer.forward("policy", batch_of(datums()))
    for shard in shards.values():
        shard.b.zero_()
    after, base = (trainer.forward(name, batch_of(datums())) for name in ("policy", None))
    assert all(np.array_equal(a, b) for a, b in zip(after.logprobs, base.logprobs, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(after.logprobs, before.logprobs, strict=True))


def test_bf16_keeps_small_updates_in_the_masters(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"), torch.bfloat16)
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    start = trainer.export_adapter("policy")[key]
    for _ in range(3):
        trainer.forward_backward("policy", batch_of(datums()), policy_gradient)
        trainer.optim_step("policy", AdamParams(learning_rate=1e-6))
    moved = np.abs(trainer.export_adapter("policy")[key] - start)
    assert 0 < moved.max() <= 4e-6  # bfloat16 alone could not move by less than 2e-4 at such values


def test_a_resumed_trainer_goes_on_bit_for_bit(folders: Callable[[str], Path]) -> None:
    def run(trainer: Trainer, steps: range) -> None:
        for step in steps:
            trainer.forward_backward("policy", batch_of(datums(seed=step)), policy_gradient)
            if step != 2:  # a gradient is left over at the checkpoint
                trainer.optim_step("policy", ADAM)

    spec = LoraSpec(rank=4, alpha=7.0)
    whole, first, second, cold = (trainer_of(folders("qwen2"), torch.bfloat16) for _ in range(4))
    for trainer, seed in ((whole, 1), (first, 1), (second, 99), (cold, 1)):
        trainer.add_adapter("policy", spec, seed=seed)
    run(whole, range(5))
    run(first, range(3))
    saved = first.state_dict("policy")
    run(first, range(3, 5))  # the saved state is a copy
    second.load_state_dict("policy", saved)
    run(second, range(3, 5))
    run(cold, range(3, 5))
    assert state_bytes(second, "policy") == state_bytes(whole, "policy") == state_bytes(first, "policy")
    assert state_bytes(cold, "policy") != state_bytes(whole, "policy")
    shards = zip(second.adapter_shards("policy").values(), whole.adapter_shards("policy").values(), strict=True)
    assert all(torch.equal(a.a, b.a) and torch.equal(a.b, b.b) for a, b in shards)


def test_a_state_of_another_adapter_is_refused_whole(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    trainer.add_adapter("other", LoraSpec(rank=2), seed=1)
    before = state_bytes(trainer, "policy")
    with pytest.raises(CheckpointError, match="'master'"):
        trainer.load_state_dict("policy", trainer.state_dict("other"))
    state = trainer.state_dict("policy")
    with pytest.raises(CheckpointError, match="'exp_avg' is missing"):
        trainer.load_state_dict("policy", {k: 0 * v for k, v in state.items() if k != "exp_avg"})
    assert state_bytes(trainer, "policy") == before


def test_import_is_the_inverse_of_export_and_refuses_what_does_not_fit(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    trainer.add_adapter("copy", LoraSpec(rank=4), seed=2)
    trainer.forward_backward("policy", batch_of(datums()), policy_gradient)
    trainer.optim_step("policy", ADAM)
    exported = dict(trainer.export_adapter("policy"))
    trainer.forward_backward("copy", batch_of(datums()), policy_gradient)
    trainer.optim_step("copy", ADAM)
    trainer.import_adapter("copy", exported)
    batch = batch_of(datums())
    one, two = trainer.forward("policy", batch), trainer.forward("copy", batch)
    assert all(np.array_equal(a, b) for a, b in zip(one.logprobs, two.logprobs, strict=True))
    state = trainer.state_dict("copy")
    assert state["step"] == 0
    assert not state["exp_avg"].any()
    before, key = state_bytes(trainer, "copy"), next(iter(exported))
    for changed, message in (
        ({**exported, key: np.ones((4, 3), dtype=np.float32)}, r"'copy': .*shape \[4, 3\], must be \[4, 128\]"),
        ({k: v for k, v in exported.items() if k != key}, "missing or unknown"),
        ({**exported, "model.norm.lora_A.weight": exported[key]}, r"model\.norm"),
    ):
        with pytest.raises(AdapterError, match=message):
            trainer.import_adapter("copy", changed)
    assert state_bytes(trainer, "copy") == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped(folders: Callable[[str], Path], bad: float) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    trainer.forward_backward("policy", batch_of(datums()), policy_gradient)
    trainer.optim_step("policy", ADAM)
    before = state_bytes(trainer, "policy")
    trainer.forward_backward("policy", batch_of(datums()), lambda inputs: LossOutput(per_token=inputs.logprobs * bad))
    result = trainer.optim_step("policy", ADAM)
    assert not np.isfinite(result.grad_norm)
    assert result.step == 1
    assert state_bytes(trainer, "policy") == before
