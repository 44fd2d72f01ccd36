"""Is there one copy of the weights, do trainer and engine agree, what does a sleep give back, and does it stay?

Starts the pair as a recipe does, checks that Megatron's base weights are the engine's tensors, measures the difference
of logprobs over sampled tokens at random adapters, and sleeps, trains and wakes many times.

    torchrun --standalone --nproc_per_node=1 -m benchmarks.gpu.pair --out out/ --model folder
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.gpu import report
from framework.algorithms.mismatch import measure_mismatch
from framework.batching import Batch, make_batch
from framework.config import EngineConfig, HardwareConfig, ModelConfig, RunConfig, TrackingConfig, TrainerConfig
from framework.engine.base import SampleRequest, generate
from framework.lora.spec import LoraSpec
from framework.runtime import POLICY, SamplingRuntime, open_sampling
from framework.types import AdamParams, AdapterRef, Completion, Datum, Prompt, SamplingParams


def open_pair(
    model: Path, out: Path, rank: int, *, eager: bool, recompute: str, numerics: Literal["fast", "exact"] = "fast"
) -> SamplingRuntime:
    """The runtime of a recipe."""
    return open_sampling(
        RunConfig(
            run_dir=str(out / "run"),
            model=ModelConfig(name_or_path=str(model)),
            hardware=HardwareConfig(device="auto"),
            trainer=TrainerConfig(recompute=recompute, max_tokens_per_microbatch=16384),
            engine=EngineConfig(kv_cache_gib=4.0, enforce_eager=eager, max_num_batched_tokens=8192),
            lora=LoraSpec(rank=rank),
            numerics=numerics,
            tracking=TrackingConfig(wandb="off"),
        )
    )


def one_copy(rt: SamplingRuntime) -> dict[str, Any]:
    """Every base parameter of the trainer lies at the address of the engine's."""
    engine: Any = rt.engine
    theirs = {tensor.data_ptr(): name for name, tensor in engine.base_weights().items()}
    trainer: Any = rt.trainer
    tensors = dict(trainer._model.named_parameters()) | {
        f"{path}.{name}": buffer
        for path, module in trainer._model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    outside = [name for name, tensor in tensors.items() if tensor.data_ptr() not in theirs]
    return {"tensors": len(tensors), "outside the engine": outside}


def sample(
    rt: SamplingRuntime, ref: AdapterRef | None, prompts: list[list[int]], max_tokens: int
) -> tuple[Completion, ...]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, ignore_eos=True)
    return generate(
        rt.engine,
        [
            SampleRequest(request_id=str(i), prompt=Prompt(token_ids=tuple(p)), sampling=sampling, adapter=ref)
            for i, p in enumerate(prompts)
        ],
    )


def batch_of(prompts: list[list[int]], completions: tuple[Completion, ...]) -> Batch:
    datums = [
        Datum(
            token_ids=tuple(p) + c.token_ids,
            loss_mask=(False,) * len(p) + (True,) * len(c.token_ids),
            fields={"advantages": (0.0,) * len(p) + (1.0,) * len(c.token_ids)},
        )
        for p, c in zip(prompts, completions, strict=True)
    ]
    return make_batch(datums, aggregation="token_mean", max_tokens=16384)


def disagreement(
    rt: SamplingRuntime, ref: AdapterRef | None, prompts: list[list[int]], max_tokens: int
) -> dict[str, Any]:
    """Of the trainer's logprobs from the engine's, over sampled tokens."""
    completions = sample(rt, ref, prompts, max_tokens)
    trained = rt.trainer.forward(None if ref is None else POLICY, batch_of(prompts, completions))
    ours = torch.from_numpy(np.concatenate(trained.logprobs))
    theirs = torch.tensor([x for c in completions for x in c.sampling_logprobs])
    mismatch = measure_mismatch(ours, theirs)
    values = {name: float(m.sum) / float(m.count) for name, m in mismatch.means.items()}
    return {"tokens": len(ours), **values, **{k: float(v) for k, v in mismatch.maxima.items()}}


def cycles(rt: SamplingRuntime, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Memory and times over sleeps with a training step in each, and the tokens before and after."""
    from framework.algorithms.supervised import CrossEntropy

    device = rt.base.device
    batch = batch_of(prompts, sample(rt, None, prompts, 64))
    greedy = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)

    def tokens() -> tuple[int, ...]:
        request = SampleRequest(
            request_id="g", prompt=Prompt(token_ids=tuple(prompts[0])), sampling=greedy, adapter=None
        )
        return generate(rt.engine, [request])[0].token_ids

    before, used, asleep, sleeps, wakes = tokens(), [], [], [], []
    for _ in range(count):
        started = time.perf_counter()
        rt.engine.sleep()
        device.synchronize()
        sleeps.append(time.perf_counter() - started)
        asleep.append(used_gib())
        rt.trainer.forward_backward(POLICY, batch, CrossEntropy())
        rt.trainer.optim_step(POLICY, AdamParams(learning_rate=0.0))
        device.synchronize()
        started = time.perf_counter()
        rt.engine.wake()
        device.synchronize()
        wakes.append(time.perf_counter() - started)
        used.append(used_gib())
    return {
        "cycles": count,
        "awake GiB first": used[0],
        "awake GiB last": used[-1],
        "residue MiB": 1024 * (used[-1] - used[min(2, count - 1)]),
        "asleep GiB": asleep[-1],
        "sleep": report.percentiles(sleeps),
        "wake": report.percentiles(wakes),
        "same tokens": tokens() == before,
    }


def used_gib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--name", default="pair")
    args = parser.parse_args()
    started = time.perf_counter()
    rt = open_pair(args.model, args.out, args.rank, eager=not args.graphs, recompute="full")
    figures: dict[str, Any] = {"start s": round(time.perf_counter() - started, 1), "one copy": one_copy(rt)}
    print(figures, flush=True)
    generator = torch.Generator().manual_seed(0)
    vocab = rt.base.spec.vocab_size
    prompts = torch.randint(0, min(vocab, 40000), (64, 48), generator=generator).tolist()
    rt.trainer.add_adapter(POLICY, LoraSpec(rank=args.rank), seed=0)
    figures["base"] = disagreement(rt, None, prompts, 128)
    ref = rt.weight_sync.push(POLICY)
    for step in (0, 1, args.steps):
        while step and step_of(rt) < step:
            train_once(rt, prompts)
        ref = rt.weight_sync.push(POLICY)
        figures[f"step {step}"] = disagreement(rt, ref, prompts, 128)
        print(step, figures[f"step {step}"], flush=True)
    figures["cycles"] = cycles(rt, prompts, args.cycles)
    print(figures, flush=True)
    report.write(args.out / f"{args.name}.json", figures)


def step_of(rt: SamplingRuntime) -> int:
    return int(rt.trainer.state_dict(POLICY)["step"])


def train_once(rt: SamplingRuntime, prompts: list[list[int]]) -> None:
    """One step on freshly sampled tokens with random advantages: the policy moves, towards nothing."""
    from framework.algorithms.supervised import CrossEntropy

    batch = batch_of(prompts, sample(rt, None, prompts, 32))
    rt.trainer.forward_backward(POLICY, batch, CrossEntropy())
    rt.trainer.optim_step(POLICY, AdamParams(learning_rate=1e-4))


if __name__ == "__main__":
    main()
