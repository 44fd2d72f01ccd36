"""The oracle: transformers + PEFT + torch.optim.AdamW, one sequence at a time, no packing, plain autograd.

It shares no code with the trainers: names and shapes of the factors, the token shift and the mean are spelled again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from framework.lora.spec import LoraSpec
from framework.types import AdamParams, Datum

ENTROPY_BONUS = 0.1
Factors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one batch."""

    loss: float
    gradient: dict[str, Tensor]
    """By PEFT's names, ``<module path>.lora_A.weight``."""
    logprobs: list[Tensor]
    """One ``[scored]`` per datum."""
    entropy: list[Tensor]


def load(path: Path) -> PreTrainedModel:
    """The base model in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.requires_grad_(False)


def make_datums(vocab_size: int, lengths: Sequence[int] = (9, 17, 12, 30, 5, 2), seed: int = 0) -> list[Datum]:
    """Random tokens; masks with holes, the first datum with nothing to train on at its end."""
    rng = np.random.default_rng(seed)
    datums = []
    for index, length in enumerate(lengths):
        mask = rng.random(length) < 0.6
        mask[0], mask[-1] = False, index > 0
        datums.append(
            Datum(
                token_ids=tuple(int(t) for t in rng.integers(0, vocab_size, length)),
                loss_mask=tuple(bool(m) for m in mask),
                fields={"advantages": tuple(float(a) for a in rng.normal(size=length))},
            )
        )
    return datums


def make_factors(base: PreTrainedModel, spec: LoraSpec, *, zero_b: bool = False, seed: int = 5) -> Factors:
    """Whole factors for every targeted linear of the base model, by PEFT's names."""
    rng = np.random.default_rng(seed)
    factors: Factors = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in spec.targets:
            out_features, in_features = module.weight.shape
            bound = in_features**-0.5
            factors[f"{name}.lora_A.weight"] = rng.uniform(-bound, bound, (spec.rank, in_features)).astype(np.float32)
            b = rng.normal(scale=0.0 if zero_b else 0.05, size=(out_features, spec.rank))
            factors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    return factors


def with_adapter(base: PreTrainedModel, spec: LoraSpec, factors: Factors) -> peft.PeftModel:
    """A copy of the base with the adapter on it."""
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        bias="none",
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    assert isinstance(model, peft.PeftModel)
    with torch.no_grad():
        for name, value in factors.items():
            model.get_parameter(_peft_name(name)).copy_(torch.from_numpy(value))
    trainable = sum(p.requires_grad for p in model.parameters())
    assert trainable == len(factors)
    return model


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def forward_backward(
    model: peft.PeftModel | PreTrainedModel, names: Sequence[str], datums: Sequence[Datum], *, temperature: float
) -> Outcome:
    """Loss, gradient, logprobs and entropy of ``sum(-logprob * advantage - bonus * entropy) / scored tokens``."""
    total = torch.zeros(())
    count = sum(sum(d.loss_mask) for d in datums)
    logprobs, entropies = [], []
    for datum in datums:
        tokens = torch.tensor(datum.token_ids)
        log_p = (model(tokens[None]).logits[0].float() / temperature).log_softmax(-1)[:-1]
        entropy = -(log_p.exp() * log_p).sum(-1)
        chosen = log_p.gather(1, tokens[1:, None])[:, 0]
        mask = torch.tensor(datum.loss_mask)[1:]
        advantage = torch.tensor(datum.fields["advantages"])[1:]
        total = total + ((-chosen * advantage - ENTROPY_BONUS * entropy) * mask).sum() / count
        logprobs.append(chosen[mask].detach())
        entropies.append(entropy[mask].detach())
    model.zero_grad()
    total.backward()
    gradient = {}
    for name in names:
        grad = model.get_parameter(_peft_name(name)).grad
        assert grad is not None
        gradient[name] = grad.clone()
    return Outcome(loss=total.item(), gradient=gradient, logprobs=logprobs, entropy=entropies)


def train(
    model: peft.PeftModel,
    names: Sequence[str],
    batches: Sequence[Sequence[Datum]],
    params: AdamParams,
    *,
    temperature: float,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """One AdamW step per batch: the losses, the gradient norms before clipping, and the factors at the end."""
    parameters = [model.get_parameter(_peft_name(name)) for name in names]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    losses, norms = [], []
    for datums in batches:
        losses.append(forward_backward(model, names, datums, temperature=temperature).loss)
        limit = params.max_grad_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit).item())
        optimizer.step()
    return losses, norms, {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Of a full fine-tuning."""

    losses: list[float]
    norms: list[float]
    """Before clipping."""
    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    """By the checkpoint's names."""


def train_base(
    model: PreTrainedModel, batches: Sequence[Sequence[Datum]], params: AdamParams, *, temperature: float
) -> Trained:
    """One AdamW step on every weight per batch."""
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    betas = (params.beta1, params.beta2)
    optimizer = torch.optim.AdamW(
        named.values(), lr=params.learning_rate, betas=betas, eps=params.eps, weight_decay=params.weight_decay
    )
    losses, norms = [], []
    for datums in batches:
        losses.append(forward_backward(model, [], datums, temperature=temperature).loss)
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), params.max_grad_norm or float("inf")).item())
        optimizer.step()
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    return Trained(losses=losses, norms=norms, start=start, weights=weights)


def relative_difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference over that of ``expected``, over all tensors together."""
    assert set(got) == set(expected)
    difference = sum(float((got[k].double() - expected[k].double()).square().sum()) for k in expected)
    norm = sum(float(expected[k].double().square().sum()) for k in expected)
    return float((difference / norm) ** 0.5)
