"""The two sides of training.py, each in its own process."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.algorithms.base import LossInputs, LossOutput
from framework.batching import make_batch
from framework.config import HardwareConfig, ModelConfig, RunConfig
from framework.lora.spec import TARGETS, LoraSpec
from framework.pair import load_weights, open_base, open_trainer
from framework.runtime import POLICY, versions
from framework.types import AdamParams, Datum

LEARNING_RATE = 1e-5


def make_tokens(job: dict[str, Any]) -> Tensor:
    """``[sequences, prompt + trained]`` random token ids, the same on both sides."""
    length = job["prompt_tokens"] + job["trained_tokens"]
    return torch.randint(0, 40_000, (job["sequences"], length), generator=torch.Generator().manual_seed(0))


def make_advantages(job: dict[str, Any]) -> list[float]:
    """One per sequence."""
    return [1.0 if index % 2 else -0.5 for index in range(job["sequences"])]


def megatron(job: dict[str, Any]) -> Callable[[], float]:
    """A step of this project's trainer; returns the loss."""
    cfg = RunConfig(model=ModelConfig(name_or_path=job["model"]), hardware=HardwareConfig(device="cpu"))
    base = open_base(cfg)
    trainer = open_trainer(cfg, base, load_weights(base))
    trainer.add_adapter(POLICY, LoraSpec(rank=job["rank"], alpha=2.0 * job["rank"]), seed=0)
    prompt, trained = job["prompt_tokens"], job["trained_tokens"]
    datums = [
        Datum(
            token_ids=tuple(row),
            loss_mask=(False,) * prompt + (True,) * trained,
            fields={"advantages": (advantage,) * (prompt + trained)},
        )
        for row, advantage in zip(make_tokens(job).tolist(), make_advantages(job), strict=True)
    ]

    def loss_fn(inputs: LossInputs) -> LossOutput:
        return LossOutput(per_token=-inputs.logprobs * inputs.advantages)

    def step() -> float:
        batch = make_batch(datums, aggregation="token_mean", max_tokens=cfg.trainer.max_tokens_per_microbatch)
        loss = trainer.forward_backward(POLICY, batch, loss_fn).loss
        trainer.optim_step(POLICY, AdamParams(learning_rate=LEARNING_RATE, max_grad_norm=1.0))
        return loss

    return step


def transformers(job: dict[str, Any]) -> Callable[[], float]:
    """The same step with transformers and PEFT, adapter in bf16 like the base; returns the loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    config = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=list(TARGETS))
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    tokens, advantages = make_tokens(job), torch.tensor(make_advantages(job))
    keep, total = job["trained_tokens"], job["sequences"] * job["trained_tokens"]

    def step() -> float:
        loss_sum = 0.0
        for rows, gains in zip(tokens.split(job["microbatch"]), advantages.split(job["microbatch"]), strict=True):
            logits = model(input_ids=rows[:, :-1], logits_to_keep=keep, use_cache=False).logits
            logprobs = -torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), rows[:, -keep:].flatten(), reduction="none"
            )
            loss = -(logprobs.view(len(rows), keep) * gains[:, None]).sum() / total
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss_sum

    return step


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    step = {"megatron": megatron, "transformers": transformers}[job["side"]](job)
    seconds, losses = [], []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        print(seconds[-1], file=sys.stderr, flush=True)
    result = {
        "seconds": seconds,
        "losses": losses,
        "tokens": job["sequences"] * (job["prompt_tokens"] + job["trained_tokens"] - 1),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": versions(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
