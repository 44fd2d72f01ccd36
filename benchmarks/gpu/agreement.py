"""Where does the difference between the trainer's logprobs and the engine's come from?

Real weights, bf16, tokens sampled at temperature 1. First end to end: mean |difference| and gen_kl_error with one part
of the trainer after the other replaced by the engine's own kernel, and the engine against itself (a prompt read at once
against the same tokens decoded one by one). Then part by part: each of the trainer's functions on the engine's own
inputs, the fraction of elements that come out bit for bit the same.

    torchrun --standalone --nproc_per_node=1 -m benchmarks.gpu.agreement --out out/ --model folder
        [--graphs] [--exact] [--parts]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import report
from benchmarks.gpu.pair import batch_of, open_pair
from framework.algorithms.mismatch import measure_mismatch
from framework.algorithms.supervised import CrossEntropy
from framework.engine.base import SampleRequest, generate
from framework.engine.vllm.attention import engine_attention
from framework.lora.spec import LoraSpec
from framework.runtime import POLICY, SamplingRuntime
from framework.types import AdamParams, AdapterRef, Completion, Prompt, SamplingParams

TASKS = ("Write a short story about", "Explain to a child", "List five facts about", "Write a poem about")
TOPICS = (
    "the sea", "a clockmaker", "photosynthesis", "the moon", "bread", "bicycles", "winter", "a library",
    "volcanoes", "chess", "bees", "an old train", "the number zero", "a garden", "the violin", "maps",
)  # fmt: skip
TOKENS = 128


def prompts_of(rt: SamplingRuntime) -> dict[str, list[list[int]]]:
    """64 instructions in the model's chat template; 64 runs of 48 random tokens."""
    chat = [[{"role": "user", "content": f"{task} {topic}."}] for task in TASKS for topic in TOPICS]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, min(rt.base.spec.vocab_size, 40000), (64, 48), generator=generator).tolist()
    return {"chat": [list(rt.chat.prompt(messages).token_ids) for messages in chat], "random tokens": noise}


def requests(prompts: Sequence[Sequence[int]], ref: AdapterRef | None, **sampling: Any) -> list[SampleRequest]:
    params = SamplingParams(**{"max_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True, **sampling})
    return [
        SampleRequest(request_id=f"{i}", prompt=Prompt(token_ids=tuple(p)), sampling=params, adapter=ref)
        for i, p in enumerate(prompts)
    ]


def compare(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    mismatch = measure_mismatch(ours, theirs)
    means = {name.removeprefix("parity/"): float(m.sum) / float(m.count) for name, m in mismatch.means.items()}
    far = (ours - theirs).abs()
    return {**means, "within 1e-5": float((far < 1e-5).float().mean()), "max": float(far.max())}


def trained(rt: SamplingRuntime, prompts: list[list[int]], done: tuple[Completion, ...], name: str | None) -> Tensor:
    return torch.from_numpy(np.concatenate(rt.trainer.forward(name, batch_of(prompts, done)).logprobs))


def decoded(done: Sequence[Completion]) -> Tensor:
    return torch.tensor([x for c in done for x in c.sampling_logprobs])


def prefilled(
    rt: SamplingRuntime, prompts: list[list[int]], done: Sequence[Completion], ref: AdapterRef | None
) -> Tensor:
    """The engine's logprobs of the same tokens, read as a prompt."""
    whole = [list(p) + list(c.token_ids) for p, c in zip(prompts, done, strict=True)]
    scored = generate(rt.engine, requests(whole, ref, max_tokens=1, temperature=0.0, prompt_logprobs=True))
    values = [c.prompt_logprobs[len(p) :] for p, c in zip(prompts, scored, strict=True)]  # type: ignore[index]
    return torch.tensor([x for row in values for x in row], dtype=torch.float32)


@contextmanager
def attribute(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def engine_attend(q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
    """The engine's kernel, also for a sequence that has a microbatch to itself."""
    return engine_attention(q, k, v, packed.cu_seqlens, packed.max_seqlen)[0].flatten(1)


def engine_swiglu(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    torch.ops._C.silu_and_mul(out, gate_up.contiguous())
    return out


def engine_rotation(model: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Its kernel and its table; the model has no norms of q and k."""
    rotary = model.model.layers[0].self_attn.rotary_emb

    def norm_and_rotate(qkv: Tensor, qw: Any, kw: Any, cos: Tensor, sin: Tensor, heads: Any) -> tuple[Tensor, ...]:
        q, k, v = qkv.split([heads.query * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim], dim=1)
        q, k = rotary(POSITIONS["now"], q.contiguous(), k.contiguous())
        return tuple(x.contiguous().unflatten(1, (-1, heads.dim)) for x in (q, k, v))

    return norm_and_rotate


POSITIONS: dict[str, Tensor] = {}
"""Of the microbatch that the trainer is working on; its own rotation gets angles instead."""


def engine_linear(self: Any, x: Tensor) -> Tensor:
    """The adapter as the fused path makes it."""
    from framework.engine.vllm.fused_lora import expand

    factors = self.switch.modules.get(self.path)
    y = self.pointwise.product(x, self.weight, None)
    if factors is None:
        return y
    full = torch.cat([y, self.pointwise.product(x, factors.a_all, None)], dim=1)
    slot = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    return expand(full, [part.b[None, None] for part in factors.slices], slot)


def trainer_parts(rt: SamplingRuntime, model: Any) -> dict[str, Callable[[], Any]]:
    """Each replaces one part of the trainer's forward pass by the engine's, as a context."""
    from framework.trainer.megatron import layers, lora_linear

    trainer: Any = rt.trainer
    modules = list(trainer._model.modules())
    kernels = trainer._vocab.pointwise

    @contextmanager
    def pointwise(**parts: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for module in modules:
                if hasattr(module, "pointwise"):
                    stack.enter_context(attribute(module, "pointwise", replace(module.pointwise, **parts)))
            yield

    def plan(positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        POSITIONS["now"] = positions
        return original_plan(positions, *args, **kwargs)

    from framework.trainer.megatron import trainer as trainer_module

    original_plan = trainer_module.plan
    trainer_module.plan = plan
    assert kernels is not None
    return {
        "attention": lambda: attribute(layers, "attend", engine_attend),
        "swiglu": lambda: pointwise(swiglu=engine_swiglu),
        "rotation": lambda: pointwise(norm_and_rotate=engine_rotation(model)),
        "linears": lambda: attribute(lora_linear.ParallelLinear, "local_product", engine_linear),
    }


def end_to_end(
    rt: SamplingRuntime, model: Any, ref: AdapterRef | None, prompts: list[list[int]], *, with_parts: bool
) -> dict[str, Any]:
    """Of sampled tokens: the engine against itself, the trainer as it is, and if asked with the engine's parts."""
    name = None if ref is None else POLICY
    done = generate(rt.engine, requests(prompts, ref))
    sampled, read, mine = decoded(done), prefilled(rt, prompts, done, ref), trained(rt, prompts, done, name)
    figures: dict[str, Any] = {"tokens": len(sampled)}
    figures["engine, read at once against decoded"] = compare(read, sampled)
    figures["trainer"] = compare(mine, sampled)
    figures["trainer against the engine reading"] = compare(mine, read)
    parts = trainer_parts(rt, model) if with_parts else {}
    for what, part in parts.items():
        with part():
            figures[f"trainer with the engine's {what}"] = compare(trained(rt, prompts, done, name), sampled)
    with ExitStack() as stack:
        for part in parts.values():
            stack.enter_context(part())
        if parts:
            figures["trainer with all of these"] = compare(trained(rt, prompts, done, name), sampled)
    for what, values in figures.items():
        print("   ", what, values, flush=True)
    return figures


def half_logits(rt: SamplingRuntime, model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Both sides with logits rounded to bf16, as they were before; the base model."""
    trainer: Any = rt.trainer
    rounded = replace(trainer._vocab.pointwise, logits=lambda hidden, weight: hidden @ weight.t())
    processor = getattr(model.logits_processor, "base_layer", model.logits_processor)
    with ExitStack() as stack:
        stack.enter_context(attribute(processor, "head_dtype", None))
        stack.enter_context(attribute(trainer, "_vocab", replace(trainer._vocab, pointwise=rounded)))
        done = generate(rt.engine, requests(prompts, None))
        return compare(trained(rt, prompts, done, None), decoded(done))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--exact", action="store_true", help="numerics=exact")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--parts", action="store_true", help="also with parts of the trainer replaced, without graphs")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--name", default="agreement")
    args = parser.parse_args()
    numerics: Literal["fast", "exact"] = "exact" if args.exact else "fast"
    rt = open_pair(args.model, args.out, 32, eager=not args.graphs, recompute="full", numerics=numerics)
    engine: Any = rt.engine
    from benchmarks.gpu.agreement_parts import part_by_part, runner_model

    model = runner_model(engine)
    sets = prompts_of(rt)
    figures: dict[str, Any] = {}
    if args.parts:
        figures["part by part"] = part_by_part(rt, model, sets["chat"][0])
    for what, prompts in sets.items():
        if args.parts:
            figures[f"{what}, bf16 logits"] = half_logits(rt, model, prompts)
            print(what, "bf16 logits", figures[f"{what}, bf16 logits"], flush=True)
        print(what, "base", flush=True)
        figures[f"{what}, base"] = end_to_end(rt, model, None, prompts, with_parts=args.parts)
    rt.trainer.add_adapter(POLICY, LoraSpec(rank=32), seed=0)
    prompts = sets["chat"]
    batch = batch_of(prompts, generate(rt.engine, requests(prompts, None)))
    steps = 0
    for target in (0, 1, args.steps):
        while steps < target:
            rt.trainer.forward_backward(POLICY, batch, CrossEntropy())
            rt.trainer.optim_step(POLICY, AdamParams(learning_rate=1e-4))
            steps += 1
        ref = rt.weight_sync.push(POLICY)
        for what, mine in sets.items():
            print(what, "step", steps, flush=True)
            figures[f"{what}, step {steps}"] = end_to_end(rt, model, ref, mine, with_parts=args.parts)
        report.write(args.out / f"{args.name}.json", figures)
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
