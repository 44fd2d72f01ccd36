"""The sides of sampling.py: this project's engine, and vLLM as its users start it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from framework.config import ModelConfig, RunConfig
from framework.data.chat import Chat
from framework.engine.base import SampleRequest, generate
from framework.lora.peft_io import load_peft
from framework.pair import open_base, open_pair
from framework.runtime import versions
from framework.types import AdapterRef, Prompt, SamplingParams

NAME = "bench"


def seeds_of(job: dict[str, Any]) -> list[tuple[int, str]]:
    """Seed and text of every request."""
    repeats = job["completions"] // len(job["prompts"])
    return [(i * repeats + j, text) for i, text in enumerate(job["prompts"]) for j in range(repeats)]


def tokens_per_s(work: Callable[[int], int], rounds: int) -> list[float]:
    """Speed of each round."""
    speeds = []
    for index in range(rounds):
        started = time.perf_counter()
        count = work(index)
        speeds.append(count / (time.perf_counter() - started))
    return speeds


def drive(llm: Any, requests: list[tuple[str, list[int], Any]], lora: Any) -> int:
    """Requests through vLLM's own engine calls; returns the number of sampled tokens."""
    for request_id, tokens, params in requests:
        llm.add_request(request_id, {"prompt_token_ids": tokens}, params, lora_request=lora)
    count = 0
    while llm.has_unfinished_requests():
        count += sum(len(output.outputs[0].token_ids) for output in llm.step() if output.finished)
    return count


def plain_params(job: dict[str, Any], seed: int) -> Any:
    """The request's parameters as vLLM's users write them."""
    from vllm import SamplingParams as Params
    from vllm.sampling_params import RequestOutputKind

    return Params(
        max_tokens=job["max_tokens"],
        temperature=1.0,
        ignore_eos=True,
        seed=seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def tandem(job: dict[str, Any]) -> dict[str, list[float]]:
    """Our engine through its Protocol, the same engine through vLLM's calls, and the base model."""
    from vllm.lora.request import LoRARequest

    lora, tensors = load_peft(Path(job["adapter"]))
    base = open_base(RunConfig(model=ModelConfig(name_or_path=job["model"])))
    pair = open_pair(RunConfig(model=ModelConfig(name_or_path=job["model"]), lora=lora), base)
    engine, trainer, sync = pair.engine, pair.trainer, pair.weight_sync
    trainer.add_adapter(NAME, lora, seed=0)
    trainer.import_adapter(NAME, tensors)
    ref = sync.push(NAME)
    tokens = {text: Chat(tokenizer(job)).tokens(text) for text in job["prompts"]}

    def ours(index: int, adapter: AdapterRef | None) -> int:
        requests = [
            SampleRequest(
                request_id=f"{index}/{adapter}/{seed}",
                prompt=Prompt(token_ids=tokens[text]),
                sampling=SamplingParams(max_tokens=job["max_tokens"], ignore_eos=True, seed=seed),
                adapter=adapter,
            )
            for seed, text in seeds_of(job)
        ]
        return sum(len(completion.token_ids) for completion in generate(engine, requests))

    def theirs(index: int) -> int:
        requests = [(f"{index}/{seed}", list(tokens[text]), plain_params(job, seed)) for seed, text in seeds_of(job)]
        return drive(engine.llm_engine, requests, LoRARequest(str(ref), ref.version, f"memory://{ref}"))

    return {
        "tandem": tokens_per_s(lambda index: ours(index, ref), job["rounds"]),
        "vLLM's calls, our engine": tokens_per_s(theirs, job["rounds"]),
        "tandem, base model": tokens_per_s(lambda index: ours(index, None), job["rounds"]),
    }


def stock_vllm(job: dict[str, Any]) -> dict[str, list[float]]:
    """vLLM without this project: its defaults, its LoRA code, the adapter from its folder."""
    from vllm import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    args = EngineArgs(
        model=job["model"],
        dtype="bfloat16",
        max_model_len=2048,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=16,
        enable_chunked_prefill=False,  # seeded requests fail with it on a CPU
        max_num_batched_tokens=8192,
        disable_log_stats=True,
    )
    llm = LLMEngine.from_engine_args(args)
    texts = {text: tokenizer(job)(text, add_special_tokens=False)["input_ids"] for text in job["prompts"]}

    def work(index: int) -> int:
        requests = [(f"{index}/{seed}", texts[text], plain_params(job, seed)) for seed, text in seeds_of(job)]
        return drive(llm, requests, LoRARequest("bench", 1, job["adapter"]))

    return {"stock vLLM": tokens_per_s(work, job["rounds"])}


def tokenizer(job: dict[str, Any]) -> Any:
    """The model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["model"])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    speeds = {"tandem": tandem, "vllm": stock_vllm}[job["side"]](job)
    Path(sys.argv[2]).write_text(json.dumps({"tokens_per_s": speeds, "versions": versions()}))


if __name__ == "__main__":
    main()
