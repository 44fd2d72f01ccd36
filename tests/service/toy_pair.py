"""The toy trainer and engine as what a service runs on."""

from __future__ import annotations

from framework.service.launch import Backend
from framework.service.service import Model
from framework.weight_sync import VersionCounter, WeightSync
from tests.service.toy import CONTEXT, VOCAB, AsciiTokenizer, OneRank, ToyEngine, ToyTrainer


def toy_backend(*, trainer: ToyTrainer | None = None, engine: ToyEngine | None = None) -> Backend:
    trainer, engine = trainer or ToyTrainer(), engine or ToyEngine()
    return Backend(
        trainer=trainer,
        engine=engine,
        weight_sync=WeightSync(
            trainer, engine, VersionCounter(), synchronize=lambda: None, check_lockstep=lambda what, value: None
        ),
        mesh=OneRank(),
        tp_size=1,
        vocab_size=VOCAB,
        pad_to_multiple_of=1,
        max_lora_rank=64,
        max_in_flight=64,
        host_threads=None,
        memory={"kv_cache_gib": 0.5},
        max_tokens_per_microbatch=2048,
        model=Model(
            name="toy/bigram",
            aliases=("base",),
            arch="bigram",
            tokenizer_id="toy/bigram",
            context_tokens=CONTEXT,
            tokenizer=AsciiTokenizer(),
        ),
    )
