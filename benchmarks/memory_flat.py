"""Does memory stay flat? Resident memory over steps of push, generate and train, and over adapters made and removed.

    python benchmarks/memory_flat.py --steps 300 --adapters 50

One rank, a tiny random model unless ``--model`` names another. Exit code 1 when memory after the last step is more
than 3% above that after step 30.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys

import psutil
import torch

from framework.algorithms.supervised import CrossEntropy
from framework.batching import make_batch
from framework.config import RunConfig, to_typed
from framework.doctor import TINY
from framework.engine.base import RolloutEngine, SampleRequest, generate
from framework.lora.spec import LoraSpec
from framework.pair import open_base, open_pair
from framework.trainer.base import Trainer
from framework.types import AdamParams, Datum, Prompt, SamplingParams
from framework.weight_sync import WeightSync

WARM_STEPS = 30
LIMIT = 1.03


def resident_mib() -> float:
    """This process's resident memory."""
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


def one_step(trainer: Trainer, engine: RolloutEngine, sync: WeightSync, name: str, step: int) -> None:
    """Pushes, samples four completions, trains on them."""
    ref = sync.push(name)
    sampling = SamplingParams(max_tokens=16, seed=step, ignore_eos=True)
    prompts = [tuple(range(5 + i, 25 + i)) for i in range(4)]
    done = generate(
        engine,
        [
            SampleRequest(request_id=f"{step}/{i}", prompt=Prompt(token_ids=p), sampling=sampling, adapter=ref)
            for i, p in enumerate(prompts)
        ],
    )
    datums = [
        Datum(token_ids=p + c.token_ids, loss_mask=(False,) * len(p) + (True,) * len(c.token_ids), adapter=ref)
        for p, c in zip(prompts, done, strict=True)
    ]
    sync.verify(ref)
    batch = make_batch(
        datums, aggregation="token_mean", max_tokens=256, multiple_of=trainer.token_multiple, version=ref
    )
    trainer.forward_backward(name, batch, CrossEntropy())
    trainer.optim_step(name, AdamParams(learning_rate=1e-4))


def measure(cfg: RunConfig, *, steps: int, adapters: int) -> dict[str, float]:
    """MiB after :data:`WARM_STEPS`, after the last step, and around the adapters."""
    pair = open_pair(cfg, open_base(cfg))
    engine, trainer, sync = pair.engine, pair.trainer, pair.weight_sync
    spec = LoraSpec(rank=cfg.lora.rank)
    trainer.add_adapter("policy", spec, seed=0)
    seen: dict[str, float] = {}
    for step in range(1, steps + 1):
        one_step(trainer, engine, sync, "policy", step)
        if step == min(WARM_STEPS, steps - 1):
            seen["warm_mib"] = resident_mib()
    seen["end_mib"] = resident_mib()
    for number in range(adapters):
        name = f"tenant-{number}"
        trainer.add_adapter(name, spec, seed=number)
        one_step(trainer, engine, sync, name, steps + 1 + number)
        sync.release(name)
        trainer.remove_adapter(name)
        if number == 0:
            seen["first_adapter_mib"] = resident_mib()
    seen["adapters_mib"] = resident_mib()
    seen["growth"] = seen["end_mib"] / seen["warm_mib"]
    seen["adapters_growth"] = seen["adapters_mib"] / seen["first_adapter_mib"]
    return seen


def config(model: str) -> RunConfig:
    """A small engine; two slots."""
    return to_typed(
        {
            "model": {"name_or_path": model, "dtype": "float32"},
            "engine": {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.1},
        }
    )


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--adapters", type=int, default=50)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seen = measure(config(arguments.model), steps=arguments.steps, adapters=arguments.adapters)
    print(json.dumps({name: round(value, 4) for name, value in seen.items()}))
    sys.exit(0 if max(seen["growth"], seen["adapters_growth"]) <= LIMIT else 1)


if __name__ == "__main__":
    main()
