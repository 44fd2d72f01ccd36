"""Small models, batches and a loss that the tests of the reference trainer share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from framework.algorithms.base import LossInputs, LossOutput, Metric
from framework.batching import Batch, aggregate, pack, shift
from framework.device import open_device
from framework.trainer.base import Trainer
from framework.trainer.hf.trainer import HfTrainer
from framework.types import AdamParams, Datum

TEMPERATURE = 0.7
# Adam divides by the gradient's size; an eps of its order keeps it from magnifying the last bit of entries near zero.
ADAM = AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.95, eps=1e-4, weight_decay=0.1, max_grad_norm=0.05)


def trainer_of(folder: Path, dtype: torch.dtype = torch.float32) -> HfTrainer:
    return HfTrainer(folder, device=open_device("cpu", local_rank=0), dtype=dtype)


def datums(count: int = 6, seed: int = 3) -> list[Datum]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(rng.integers(4, 20)) if index else 19
        mask = [False, *(bool(x) for x in rng.integers(0, 2, length - 1))]
        mask[-1] = True
        made.append(
            Datum(
                token_ids=tuple(int(t) for t in rng.integers(0, 96, length)),
                loss_mask=tuple(mask),
                fields={"advantages": tuple(float(a) for a in rng.normal(size=length))},
            )
        )
    return made


def batch_of(rows: list[Datum], *, max_tokens: int = 32, multiple_of: int = 1) -> Batch:
    examples = aggregate([shift(row) for row in rows], "token_mean")
    return pack(examples, max_tokens=max_tokens, multiple_of=multiple_of, temperature=TEMPERATURE)


def policy_gradient(inputs: LossInputs) -> LossOutput:
    per_token = -inputs.logprobs * inputs.advantages - 0.01 * inputs.entropy
    counted = Metric(sum=inputs.entropy.detach().sum(), count=float(len(inputs.entropy)))
    return LossOutput(per_token=per_token, metrics={"loss/entropy": counted})


def state_bytes(trainer: Trainer, name: str) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in trainer.state_dict(name).items()}
