"""How many tokens per second through our engine, beside plain vLLM with the same adapter and beside the base model?

128 prompts of 64 tokens, 256 tokens each, Qwen3-4B shapes, LoRA r=32 on all linears, CUDA graphs; then the base model
through an engine that was started without LoRA, in a process of its own. The floor of a decode step is the bytes of the
weights over the memory's bandwidth.

    python -m benchmarks.gpu.sampling --out out/ [--lora-configs folder]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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
SIDES = ("with LoRA", "without LoRA")
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


def options_of(max_adapters: int, rank: int, *, exact: bool) -> VllmOptions:
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
        exact=exact,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-4b")
    parser.add_argument("--lora-configs", type=Path)
    parser.add_argument("--name", default="sampling")
    parser.add_argument("--max-adapters", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--vllm-kernels", action="store_true", help="vLLM's own LoRA kernels instead of ours")
    parser.add_argument("--exact", action="store_true", help="numerics=exact")
    parser.add_argument("--side", choices=SIDES, help="one engine in this process; without it each in its own")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of one engine."""
    if args.vllm_kernels:
        fused_lora.MAX_SHARE = 10**9
    device = open_device("auto", local_rank=0)
    mesh = open_mesh(device, tensor_parallel_size=1, timeout_s=60.0)
    folder = SCRATCH / args.model
    if not (folder / "model.safetensors").exists():
        shapes.write_checkpoint(args.model, folder, device.torch_device)
        torch.cuda.empty_cache()
    spec = shapes.write_config(args.model, folder)
    with_lora = args.side == SIDES[0]
    options = options_of(args.max_adapters if with_lora else 0, args.rank, exact=args.exact)
    started = time.perf_counter()
    engine = VllmEngine(folder, options, mesh=mesh, device=device, dtype=torch.bfloat16)
    start_s = time.perf_counter() - started
    print(f"engine {args.side} started in {start_s:.0f} s", flush=True)
    prompts = torch.randint(0, 150000, (PROMPTS, 64), generator=torch.Generator().manual_seed(0)).tolist()
    if not with_lora:
        return {
            "start s": start_s,
            "ours": speed(lambda: ours(engine, prompts, None)),
            "plain vLLM, no logprobs": speed(lambda: plain_vllm(engine, prompts, None, None)),
        }
    state = AdapterState(spec, LoraSpec(rank=args.rank), mesh, seed=0, dtype=torch.bfloat16, device=device.torch_device)
    state.master.normal_(0.0, 0.01)
    state.publish()
    ref = AdapterRef(name="policy", version=1, content_hash="")
    engine.load_adapter(ref, state.spec, state.shards())
    return {
        "start s": start_s,
        "ours, adapter": speed(lambda: ours(engine, prompts, ref)),
        "ours, base": speed(lambda: ours(engine, prompts, None)),
        "plain vLLM, adapter": speed(lambda: plain_vllm(engine, prompts, ref, 0)),
        "plain vLLM, adapter, no logprobs": speed(lambda: plain_vllm(engine, prompts, ref, None)),
    }


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.lora_configs:
        write_lora_configs(args.lora_configs)
        os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(args.lora_configs)
    if args.side:
        result = measure(args)
        (args.out / f"{args.name}.{args.side.replace(' ', '_')}.part").write_text(json.dumps(result))
        os._exit(0)  # vLLM's teardown takes long and says nothing
    sides: dict[str, dict[str, float]] = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.gpu.sampling", *sys.argv[1:], "--side", side]
        subprocess.run(command, check=True)
        part = args.out / f"{args.name}.{side.replace(' ', '_')}.part"
        sides[side] = json.loads(part.read_text())
        part.unlink()
        print(json.dumps({side: sides[side]}, indent=1), flush=True)
    with_lora, without = (sides[side] for side in SIDES)
    ratios = {
        "ours / plain vLLM, same adapter": with_lora["ours, adapter"] / with_lora["plain vLLM, adapter"],
        "adapter / engine without LoRA": with_lora["ours, adapter"] / without["ours"],
        "adapter / base model of the same engine": with_lora["ours, adapter"] / with_lora["ours, base"],
    }
    print(json.dumps(ratios, indent=1), flush=True)
    settings = {"configured": bool(args.lora_configs), "fused": not args.vllm_kernels, "exact": args.exact}
    report.write(args.out / f"{args.name}.json", {**sides, "ratios": ratios, **settings})


if __name__ == "__main__":
    main()
