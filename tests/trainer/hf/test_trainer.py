"""The reference trainer against plain PEFT and torch, on small random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from framework.algorithms.base import LossInputs, LossOutput
from framework.batching import Example, pack, shift
from framework.errors import AdapterError, ConfigError, ModelError
from framework.lora.init import init_a
from framework.lora.peft_io import save_peft
from framework.lora.spec import LoraSpec
from framework.models.tiny import make_tiny_model
from framework.trainer.base import Trainer
from framework.types import AdamParams, Datum
from tests.trainer.hf.small import ADAM, TEMPERATURE, batch_of, datums, policy_gradient, state_bytes, trainer_of


def plain_logprobs(model: torch.nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """One sequence at a time through the whole model: no packing, no padding, no chunks."""
    logits = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0] / TEMPERATURE
    log_p = torch.log_softmax(logits.float(), dim=-1)[torch.from_numpy(example.scored)]
    picked = log_p[torch.arange(len(log_p)), torch.from_numpy(example.target_ids)]
    return picked, -(log_p.exp() * log_p).sum(-1)


def plain_loss(model: torch.nn.Module, rows: list[Datum]) -> Tensor:
    """The same loss as everybody writes it: padded rows, the logits of every position, a mask."""
    ids, mask, advantages = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(values) for values in columns], batch_first=True)
        for columns in zip(*((r.token_ids, r.loss_mask, r.fields["advantages"]) for r in rows), strict=True)
    )
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r.token_ids)) for r in rows], batch_first=True)
    logits = model(input_ids=ids[:, :-1], attention_mask=attention[:, 1:]).logits / TEMPERATURE
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logprobs = log_p.gather(2, ids[:, 1:, None])[:, :, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    per_token = -logprobs * advantages[:, 1:] - 0.01 * entropy
    return per_token[mask[:, 1:]].sum() / mask.sum()


def plain_peft(folder: Path, spec: LoraSpec, trainer: Trainer, name: str) -> PeftModel:
    """PEFT as everybody uses it, with its own scaling, started from the trainer's factors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    alpha: int = spec.alpha  # type: ignore[assignment]
    config = LoraConfig(
        r=spec.rank, lora_alpha=alpha, target_modules=list(spec.targets), use_rslora=spec.use_rslora, lora_dropout=0.0
    )
    peft_model = get_peft_model(model, config)
    for key, value in trainer.export_adapter(name).items():
        path = key.removesuffix(".weight")
        peft_model.get_parameter(f"base_model.model.{path}.default.weight").data.copy_(torch.from_numpy(value))
    return peft_model


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4, alpha=8.0),
        LoraSpec(rank=3, alpha=7.0, use_rslora=True, targets=("q_proj", "v_proj")),
        LoraSpec(rank=4, alpha=5.0, targets=("o_proj", "down_proj", "up_proj")),
    ],
)
def test_five_steps_equal_plain_peft_and_torch_adamw(
    folders: Callable[[str], Path], family: str, spec: LoraSpec
) -> None:
    trainer = trainer_of(folders(family))
    trainer.add_adapter("policy", spec, seed=1)
    model = plain_peft(folders(family), spec, trainer, "policy")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=ADAM.weight_decay
    )
    for step in range(1, 6):
        rows = datums(seed=step)
        result = trainer.forward_backward("policy", batch_of(rows, max_tokens=1000), policy_gradient)
        optim = trainer.optim_step("policy", ADAM)
        loss = plain_loss(model, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, ADAM.max_grad_norm)
        assert norm > ADAM.max_grad_norm, "the test must clip"
        optimizer.step()
        optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)  # of per-token terms of order 4
        assert optim.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert optim.step == step
        for key, value in trainer.export_adapter("policy").items():
            path = key.removesuffix(".weight")
            reference = model.get_parameter(f"base_model.model.{path}.default.weight").detach()
            assert relative(torch.from_numpy(value) - reference, reference) <= 1e-6, f"{key} after step {step}"


@pytest.mark.parametrize("max_tokens", [19, 40, 1000])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_packing_changes_neither_loss_nor_gradient_nor_logprobs(
    folders: Callable[[str], Path], max_tokens: int, multiple_of: int
) -> None:
    trainer = trainer_of(folders("qwen3"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    rows = datums()
    trainer.forward_backward("policy", batch_of(rows), policy_gradient)
    trainer.optim_step("policy", ADAM)  # so that B is not zero
    reference = trainer.forward_backward("policy", batch_of(rows, max_tokens=24), policy_gradient)
    grad = trainer.state_dict("policy")["grad"]
    trainer.zero_grad("policy")
    other = batch_of(rows, max_tokens=max_tokens, multiple_of=multiple_of)
    result = trainer.forward_backward("policy", other, policy_gradient)
    assert result.loss == pytest.approx(reference.loss, rel=1e-5)
    assert relative(trainer.state_dict("policy")["grad"] - grad, grad) <= 1e-5
    forwarded = trainer.forward("policy", other)
    model = AutoModelForCausalLM.from_pretrained(folders("qwen3"), dtype=torch.float32)
    for index, row in enumerate(rows):
        example = shift(row)
        assert len(result.result.logprobs[index]) == len(example.scored)
        assert np.array_equal(forwarded.logprobs[index], result.result.logprobs[index])
        base_logprobs, base_entropy = (t.detach().numpy() for t in plain_logprobs(model, example))
        base = trainer.forward(None, other)
        assert np.abs(base.logprobs[index] - base_logprobs).max() <= 1e-5
        assert np.abs(base.entropy[index] - base_entropy).max() <= 1e-5
        assert np.abs(base.logprobs[index] - forwarded.logprobs[index]).max() > 1e-4, "the adapter must be applied"
    metric = result.metrics["loss/entropy"]
    assert float(metric.count) == sum(sum(row.loss_mask) for row in rows)
    assert float(metric.sum) == pytest.approx(sum(float(e.sum()) for e in forwarded.entropy), rel=1e-5)


def test_a_new_adapter_is_the_base_model_and_starts_as_the_shared_rule_says(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=7)
    batch = batch_of(datums())
    with_adapter, base = trainer.forward("policy", batch), trainer.forward(None, batch)
    assert all(np.array_equal(a, b) for a, b in zip(with_adapter.logprobs, base.logprobs, strict=True))
    exported = trainer.export_adapter("policy")
    key = "model.layers.1.mlp.down_proj.lora_A.weight"
    expected = init_a("model.layers.1.mlp.down_proj", rank=4, in_features=128, seed=7)
    assert np.array_equal(exported[key], expected.numpy())
    assert not any(value.any() for name, value in exported.items() if "lora_B" in name)


def test_q_and_v_alone_do_not_train_k(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("qwen2"))
    trainer.add_adapter("all", LoraSpec(rank=4), seed=1)
    trainer.add_adapter("qv", LoraSpec(rank=4, targets=("q_proj", "v_proj")), seed=1)
    before = trainer.export_adapter("all")
    trainer.forward_backward("qv", batch_of(datums()), policy_gradient)
    trainer.optim_step("qv", ADAM)
    assert {name.split(".")[-1] for name in trainer.adapter_shards("qv")} == {"q_proj", "v_proj"}
    assert all(value.any() for value in trainer.export_adapter("qv").values())
    assert all(np.array_equal(before[key], value) for key, value in trainer.export_adapter("all").items())
    base, all_ = (trainer.forward(name, batch_of(datums())) for name in (None, "all"))
    assert all(np.array_equal(a, b) for a, b in zip(base.logprobs, all_.logprobs, strict=True))


def test_a_failed_call_adds_nothing(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    trainer.forward_backward("policy", batch_of(datums()), policy_gradient)
    before = state_bytes(trainer, "policy")
    calls = 0

    def fails_late(inputs: LossInputs) -> LossOutput:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("second microbatch")
        return policy_gradient(inputs)

    with pytest.raises(RuntimeError, match="second microbatch"):
        trainer.forward_backward("policy", batch_of(datums()), fails_late)
    with pytest.raises(ConfigError, match="one loss per token"):
        trainer.forward_backward("policy", batch_of(datums()), lambda i: LossOutput(per_token=i.logprobs.mean()))
    assert state_bytes(trainer, "policy") == before


def test_dropout_acts_in_training_only_and_follows_torchs_seed(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4, dropout=0.5), seed=1)
    batch = batch_of(datums())
    trainer.forward_backward("policy", batch, policy_gradient)
    trainer.optim_step("policy", AdamParams(learning_rate=0.05))
    forwarded = trainer.forward("policy", batch)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        result = trainer.forward_backward("policy", batch, policy_gradient)
        losses.append(result.loss)
    assert losses[0] == losses[1] != losses[2]
    assert not np.array_equal(result.result.logprobs[0], forwarded.logprobs[0])
    again = trainer.forward("policy", batch)
    assert all(np.array_equal(a, b) for a, b in zip(forwarded.logprobs, again.logprobs, strict=True))


def test_peft_from_disk_gives_the_trainers_logprobs(folders: Callable[[str], Path], tmp_path: Path) -> None:
    trainer = trainer_of(folders("qwen3"))
    spec = LoraSpec(rank=4, alpha=7.0, use_rslora=True)
    trainer.add_adapter("policy", spec, seed=1)
    for step in range(3):
        trainer.forward_backward("policy", batch_of(datums(seed=step)), policy_gradient)
        trainer.optim_step("policy", AdamParams(learning_rate=0.02))
    tensors = trainer.export_adapter("policy")
    save_peft(tmp_path / "a", spec=spec, tensors=tensors, base_model="tiny", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folders("qwen3"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "a"))
    result = trainer.forward("policy", batch_of(datums()))
    for index, row in enumerate(datums()):
        logprobs = plain_logprobs(model, shift(row))[0].detach().numpy()
        assert np.abs(logprobs - result.logprobs[index]).max() <= 1e-5


def test_adapters_come_and_go_without_touching_each_other(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("tenant.one", LoraSpec(rank=4), seed=1)
    trainer.forward_backward("tenant.one", batch_of(datums()), policy_gradient)
    before = state_bytes(trainer, "tenant.one")
    trainer.add_adapter("two", LoraSpec(rank=2, targets=("k_proj",)), seed=1)
    with pytest.raises(AdapterError, match="already has an adapter named 'two'"):
        trainer.add_adapter("two", LoraSpec(rank=2), seed=1)
    trainer.remove_adapter("two")
    assert trainer.adapters() == {"tenant.one": LoraSpec(rank=4)}
    with pytest.raises(AdapterError, match=r"no adapter named 'two'; it has \['tenant.one'\]"):
        trainer.forward("two", batch_of(datums()))
    assert state_bytes(trainer, "tenant.one") == before
    trainer.remove_adapter("tenant.one")
    trainer.forward(None, batch_of(datums()))
    trainer.add_adapter("two", LoraSpec(rank=8), seed=1)
    trainer.forward_backward("two", batch_of(datums()), policy_gradient)
    with pytest.raises(AdapterError, match=r"lora\.rank=129"):
        trainer.add_adapter("wide", LoraSpec(rank=129), seed=1)


def test_bad_models_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        trainer_of(tmp_path / "nowhere")
    folder = make_tiny_model(tmp_path / "tiny", family="llama", vocab_size=96)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing.*layers\.1\.mlp\.up_proj\.weight"):
        trainer_of(folder)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot load it"):
        trainer_of(folder)


def test_a_temperature_of_zero_is_refused(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    batch = pack([shift(row) for row in datums()], max_tokens=32, temperature=0.0)
    with pytest.raises(ConfigError, match=r"batch\.temperature=0\.0"):
        trainer.forward(None, batch)


def test_a_microbatch_without_scored_tokens_adds_nothing(folders: Callable[[str], Path]) -> None:
    trainer = trainer_of(folders("llama"))
    trainer.add_adapter("policy", LoraSpec(rank=4), seed=1)
    rows = datums(2)
    unscored = Datum(token_ids=(1, 2, 3), loss_mask=(False,) * 3, fields={"advantages": (1.0,) * 3})
    with_it = trainer.forward_backward("policy", batch_of([*rows, unscored], max_tokens=19), policy_gradient)
    grad = trainer.state_dict("policy")["grad"]
    trainer.zero_grad("policy")
    without = trainer.forward_backward("policy", batch_of(rows, max_tokens=19), policy_gradient)
    assert with_it.loss == without.loss
    assert len(with_it.result.logprobs[2]) == 0
    assert torch.equal(trainer.state_dict("policy")["grad"], grad)
    alone = trainer.forward_backward("policy", batch_of([unscored]), policy_gradient)
    assert alone.loss == 0.0
    assert torch.equal(trainer.state_dict("policy")["grad"], grad)
