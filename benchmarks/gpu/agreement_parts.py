"""Each of the trainer's functions on the engine's own inputs: how many elements come out bit for bit the same?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.engine.base import SampleRequest, generate
from framework.runtime import SamplingRuntime
from framework.trainer.megatron.attention import attend, plan
from framework.trainer.megatron.pointwise import Heads
from framework.types import Prompt, SamplingParams

LAYERS = (0, 1, 15)


def runner_model(engine: Any) -> Any:
    """vLLM's model, whose modules can be listened to when no graphs are used."""
    from framework.engine.vllm.internals import model_runner

    return model_runner(engine.llm_engine).model


def record(rt: SamplingRuntime, model: Any, tokens: list[int]) -> dict[str, list[Tensor]]:
    """What the modules of some layers gave in one pass over the prompt, by name, cloned."""
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str, module: Any) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            if name not in seen and isinstance(values[0], Tensor) and len(values[0]) == len(tokens):
                seen[name] = [value.clone() for value in values if isinstance(value, Tensor)]

        return module.register_forward_hook(hook)

    names = ("input_layernorm", "self_attn.qkv_proj", "self_attn.rotary_emb", "self_attn.attn", "self_attn.o_proj")
    names += ("post_attention_layernorm", "mlp.gate_up_proj", "mlp.act_fn", "mlp.down_proj")
    shared = {id(layer.self_attn.rotary_emb) for layer in model.model.layers}
    handles = [
        listen(f"{index}.{name}", model.model.layers[index].get_submodule(name))
        for index in LAYERS
        for name in names
        if index == 0 or name != "self_attn.rotary_emb" or len(shared) > 1
    ]
    handles += [listen("embedding", model.model.embed_tokens), listen("norm", model.model.norm)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    request = SampleRequest(request_id="parts", prompt=Prompt(token_ids=tuple(tokens)), sampling=sampling, adapter=None)
    generate(rt.engine, [request])
    for handle in handles:
        handle.remove()
    return seen


def same(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    ours = ours.reshape(theirs.shape)
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return {"bit-equal": float((ours == theirs).float().mean()), "relative difference": float(difference)}


def part_by_part(rt: SamplingRuntime, model: Any, prompt: list[int]) -> dict[str, Any]:
    """The prompt is read twice over, so that it is longer than one block of keys."""
    tokens = (prompt * 20)[:300]
    with torch.no_grad():
        seen = record(rt, model, tokens)
        figures = {
            f"layer {index}": _layer(rt, seen, index, len(tokens)) for index in LAYERS if f"{index}.mlp.act_fn" in seen
        }
    table = model.model.layers[0].self_attn.rotary_emb.cos_sin_cache[: len(tokens)]
    cos, sin = _angles(rt, len(tokens))
    figures["rotation table"] = same(torch.cat([cos, sin], dim=1), table)
    for what, values in figures.items():
        print("   ", what, values, flush=True)
    return figures


def _angles(rt: SamplingRuntime, count: int) -> tuple[Tensor, Tensor]:
    trainer: Any = rt.trainer
    positions = torch.arange(count, device=rt.base.device.torch_device)
    angles = positions[:, None].float() * trainer._frequencies
    return angles.cos().to(rt.base.dtype), angles.sin().to(rt.base.dtype)


def _layer(rt: SamplingRuntime, seen: dict[str, list[Tensor]], index: int, count: int) -> dict[str, Any]:
    """The functions of one layer of the trainer."""
    trainer: Any = rt.trainer
    spec = rt.base.spec
    layer = trainer._model.decoder.layers[index]
    device = rt.base.device.torch_device
    packed = plan(
        torch.arange(count, device=device), torch.tensor([0, count], dtype=torch.int32), count, trainer._frequencies,
        dtype=rt.base.dtype, varlen=True,
    )  # fmt: skip
    heads = Heads(query=spec.num_heads, kv=spec.num_kv_heads, dim=spec.head_dim, eps=spec.norm_eps)
    get = {name.partition(".")[2]: values for name, values in seen.items() if name.startswith(f"{index}.")}
    figures: dict[str, Any] = {}
    if index:
        normed, residual = get["input_layernorm"]
        figures["norm"] = same(layer.input_layernorm(residual), normed)
    else:
        (normed,) = get["input_layernorm"]
        figures["norm"] = same(layer.input_layernorm(seen["embedding"][0]), normed)
    figures["qkv_proj"] = same(layer.self_attn.qkv_proj(normed), get["self_attn.qkv_proj"][0])
    q, k, v = trainer._vocab.pointwise.norm_and_rotate(
        get["self_attn.qkv_proj"][0], None, None, packed.cos, packed.sin, heads
    )
    if "self_attn.rotary_emb" in get:
        figures["rotation of q"] = same(q.flatten(1), get["self_attn.rotary_emb"][0])
        figures["rotation of k"] = same(k.flatten(1), get["self_attn.rotary_emb"][1])
    from benchmarks.gpu.agreement import engine_attend

    attention = get["self_attn.attn"][0].reshape(count, -1)
    figures["attention"] = same(attend(q, k, v, packed), attention)
    figures["attention by the engine's kernel"] = same(engine_attend(q, k, v, packed), attention)
    figures["o_proj"] = same(layer.self_attn.o_proj(attention), get["self_attn.o_proj"][0])
    after, residual = get["post_attention_layernorm"]
    figures["norm after attention"] = same(layer.post_attention_layernorm(residual), after)
    figures["gate_up_proj"] = same(layer.mlp.gate_up_proj(after), get["mlp.gate_up_proj"][0])
    figures["swiglu"] = same(trainer._vocab.pointwise.swiglu(get["mlp.gate_up_proj"][0]), get["mlp.act_fn"][0])
    figures["down_proj"] = same(layer.mlp.down_proj(get["mlp.act_fn"][0]), get["mlp.down_proj"][0])
    return figures
