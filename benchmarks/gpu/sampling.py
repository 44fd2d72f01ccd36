"""How many tokens per second through our engine, beside plain vLLM with the same adapter and beside the base model?

128 prompts of 64 tokens, 256 tokens each, Qwen3-4B shapes, LoRA r=32 on all linears, CUDA graphs. The floor of a decode
step is the bytes of the weights over the memory's bandwidth.

    python -m benchmarks.gpu.sampling --out out/ [--lora-configs folder]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import report, shapes
from framework.device import open_device
from framework.distributed import open_mesh
from framework.engine.base import SampleRequest, generate
from framework.engine.vllm import fused_lora
from framework.engine.vllm.engine import VllmEngine, VllmOptions
from framework.lora.spec import LoraSpec
from framework.trainer.megatron.adapter import AdapterState
from framework.types import AdapterRef, Prompt, SamplingParams

PROMPTS, TOKENS = 128, 256
SCRATCH = Path("/dev/shm/tandem-bench")
SHRINK = {"block_m": 32, "block_n": 32, "block_k": 128, "split_k": 8, "num_warps": 4, "num_ctas": 1, "group_size_m": 8}
EXPAND = {"block_m": 64, "block_n": 128, "block_k": 32, "num_warps": 4, "num_ctas": 1}
LATER = {"num_stages": 2, "max_nreg": None}


def write_lora_configs(folder: Path) -> None:
    """Kernel configurations for decode batches of one adapter; larger batches keep vLLM's defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
    large = SHRINK | {"block_n": 16, "block_k": 32}
    plain = {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_ctas": 1}
    for name, decode, prefill, key in (("SHRINK", SHRINK, large, "2560"), ("EXPAND_TRUE", EXPAND, plain, "32")):
        by_size = {"128": {key: {"32": decode | LATER}}, "1024": {key: {"32": prefill | LATER}}}
        path = folder / f"{gpu}_{name}.json"
        path.write_text(json.dumps({"2": dict.fromkeys(("1", "2", "3"), by_size)}))


def plain_vllm(engine: VllmEngine, prompts: list[list[int]], ref: AdapterRef | None, logprobs: int | None) -> int:
    """The same requests through vLLM's own calls."""
    from vllm import SamplingParams as Params
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    llm = engine.llm_engine
    params = Params(
        max_tokens=TOKENS, temperature=1.0, ignore_eos=True, logprobs=logprobs, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    lora = None if ref is None else LoRARequest(str(ref), ref.version, f"memory://{ref}")
    for index, prompt in enumerate(prompts):
        llm.add_request(f"plain-{index}", {"prompt_token_ids": prompt}, params, lora_request=lora)
    count = 0
    while llm.has_unfinished_requests():
        count += sum(len(o.outputs[0].token_ids) for o in llm.step() if o.finished)
    return count


def ours(engine: VllmEngine, prompts: list[list[int]], ref: AdapterRef | None) -> int:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=1.0, ignore_eos=True)
    requests = [
        SampleRequest(request_id=f"ours-{i}", prompt=Prompt(token_ids=tuple(p)), sampling=sampling, adapter=ref)
        for i, p in enumerate(prompts)
    ]
    return sum(len(c.token_ids) for c in generate(engine, requests))


def speed(work: Callable[[], int], repeats: int = 3) -> float:
    """Median tokens/s after one warm-up."""
    work()
    speeds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        count = work()
        torch.cuda.synchronize()
        speeds.append(count / (time.perf_counter() - started))
    return sorted(speeds)[len(speeds) // 2]


def options_of(max_adapters: int, rank: int) -> VllmOptions:
    """CUDA graphs, adapters on all linears."""
    return VllmOptions(
        max_model_len=1024,
        max_num_seqs=PROMPTS,
        max_num_batched_tokens=8192,
        max_adapters=max_adapters,
        max_lora_rank=rank,
        lora_parents=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        kv_cache_bytes=12 * 2**30,
        gpu_memory_utilization=0.6,
        enforce_eager=False,
        enable_prefix_caching=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-4b")
    parser.add_argument("--lora-configs", type=Path)
    parser.add_argument("--name", default="sampling")
    parser.add_argument("--max-adapters", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--vllm-kernels", action="store_true", help="vLLM's own LoRA kernels instead of ours")
    parser.add_argument("--without-vllm", action="store_true", help="our engine only")
    args = parser.parse_args()
    if args.lora_configs:
        write_lora_configs(args.lora_configs)
        os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(args.lora_configs)
    if args.vllm_kernels:
        fused_lora.MAX_SHARE = 10**9
    device = open_device("auto", local_rank=0)
    mesh = open_mesh(device, tensor_parallel_size=1, timeout_s=60.0)
    folder = SCRATCH / args.model
    if not (folder / "model.safetensors").exists():
        shapes.write_checkpoint(args.model, folder, device.torch_device)
        torch.cuda.empty_cache()
    spec = shapes.write_config(args.model, folder)
    options = options_of(args.max_adapters, args.rank)
    started = time.perf_counter()
    engine = VllmEngine(folder, options, mesh=mesh, device=device, dtype=torch.bfloat16)
    start_s = time.perf_counter() - started
    print(f"engine started in {start_s:.0f} s", flush=True)
    state = AdapterState(spec, LoraSpec(rank=args.rank), mesh, seed=0, dtype=torch.bfloat16, device=device.torch_device)
    state.master.normal_(0.0, 0.01)
    state.publish()
    ref = AdapterRef(name="policy", version=1, content_hash="")
    engine.load_adapter(ref, state.spec, state.shards())
    prompts = torch.randint(0, 150000, (PROMPTS, 64), generator=torch.Generator().manual_seed(0)).tolist()
    works: dict[str, Callable[[], int]] = {
        "ours, LoRA": lambda: ours(engine, prompts, ref),
        "ours, base": lambda: ours(engine, prompts, None),
        "plain vLLM, LoRA, logprobs": lambda: plain_vllm(engine, prompts, ref, 0),
        "plain vLLM, LoRA, no logprobs": lambda: plain_vllm(engine, prompts, ref, None),
        "plain vLLM, base, no logprobs": lambda: plain_vllm(engine, prompts, None, None),
    }
    chosen = list(works)[: 2 if args.without_vllm else None]
    figures = {what: speed(works[what]) for what in chosen}
    rows = [{"what": key, "tokens/s": round(value)} for key, value in figures.items()]
    print(report.table(rows), flush=True)
    if not args.without_vllm:
        print("ours / plain:", figures["ours, LoRA"] / figures["plain vLLM, LoRA, logprobs"])
    print("LoRA / base:", figures["ours, LoRA"] / figures["ours, base"], flush=True)
    report.write(
        args.out / f"{args.name}.json",
        {**figures, "start s": start_s, "tuned": bool(args.lora_configs), "fused": not args.vllm_kernels},
    )
    os._exit(0)  # vLLM's teardown takes long and says nothing


if __name__ == "__main__":
    main()
