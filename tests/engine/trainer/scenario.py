"""The trainer's engine over the Megatron trainer, on every rank of a launch; what it sampled goes back to the test."""

from __future__ import annotations

from typing import Any

import torch

from framework.config import schema, to_typed
from framework.distributed import close_mesh
from framework.engine.base import SampleRequest, generate
from framework.lora.spec import LoraSpec
from framework.pair import open_base, open_pair
from framework.types import Completion, Prompt, SamplingParams
from framework.weight_sync import WeightSync

PROMPTS = ((5, 6, 7), (9, 8, 7, 6, 5))


def sample(pair: Any) -> list[Completion]:
    """Greedy and seeded samples of the base model and of a pushed adapter whose B is not zero."""
    engine, trainer, sync = pair
    assert isinstance(sync, WeightSync)
    trainer.add_adapter("policy", LoraSpec(rank=3, alpha=5.0), seed=1)
    whole = {key: value.copy() for key, value in trainer.export_adapter("policy").items()}
    generator = torch.Generator().manual_seed(2)
    for key, value in whole.items():
        if ".lora_B." in key:
            value[:] = torch.randn(value.shape, generator=generator).numpy() * 0.3
    trainer.import_adapter("policy", whole)
    ref = sync.publish("policy")
    requests = [
        SampleRequest(
            request_id=f"{number}-{adapter}-{temperature}",
            prompt=Prompt(token_ids=prompt),
            sampling=SamplingParams(
                max_tokens=6, temperature=temperature, seed=number, prompt_logprobs=True, ignore_eos=True
            ),
            adapter=adapter,
        )
        for number, prompt in enumerate(PROMPTS)
        for adapter in (None, ref)
        for temperature in (0.0, 0.8)
    ]
    return list(generate(engine, requests))


def on_ranks(model: str) -> list[tuple[tuple[int, ...], tuple[float, ...], tuple[float | None, ...] | None]]:
    """Runs on each rank: the Megatron trainer in float32."""
    values = schema()
    values["model"] |= {"name_or_path": model, "dtype": "float32"}
    values["engine"] |= {"backend": "trainer", "max_model_len": 64, "max_adapters": 2}
    cfg = to_typed(values)
    pair = open_pair(cfg, open_base(cfg))
    done = sample((pair.engine, pair.trainer, pair.weight_sync))
    close_mesh()
    return [(c.token_ids, c.sampling_logprobs, c.prompt_logprobs) for c in done]
