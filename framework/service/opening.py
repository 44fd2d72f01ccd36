"""From the configuration to a running service: the runtime's trainer and engine become a :class:`Backend`."""

from __future__ import annotations

import dataclasses
import logging
import os

from framework.config import RunConfig
from framework.errors import ConfigError
from framework.lora.peft_io import peft_config
from framework.lora.spec import LoraSpec
from framework.pair import Base, Pair, cache_bytes, open_base, open_pair
from framework.service.launch import Backend, check_address, serve
from framework.service.logs import set_up_logs
from framework.service.service import Model
from framework.service.settings import ServiceConfig
from framework.weight_sync import WeightSync

log = logging.getLogger(__name__)


def open_and_serve(run: RunConfig, service: ServiceConfig) -> None:
    """Opens trainer and engine and serves until SIGTERM. Every rank calls it.

    Raises:
        ConfigError: the address is taken, the processes do not form one tensor-parallel group, or a value does not fit.
    """
    set_up_logs(service.log_level)
    if os.environ.get("RANK", "0") == "0":
        check_address(service.host, service.port)  # before a model is loaded for nothing
    backend = open_backend(run, service)
    if backend.mesh.tp_rank == 0:
        log.info("starting", extra=facts(run, service, backend))
    serve(service, backend)


def facts(run: RunConfig, service: ServiceConfig, backend: Backend) -> dict[str, object]:
    """What the first log line says, with the values in force."""
    return {
        "model": backend.model.name,
        "tensor_parallel_size": backend.tp_size,
        **backend.memory,
        "max_loras": backend.engine.max_adapters,
        "max_lora_rank": backend.max_lora_rank,
        "dtype": run.model.dtype,
        "mode": f"{run.trainer.backend} trains, {run.engine.backend} samples",
        "context_tokens": backend.model.context_tokens,
        "auth": service.auth,
        "url": f"http://{service.host}:{service.port}",
    }


def open_backend(run: RunConfig, service: ServiceConfig) -> Backend:
    """The pair of engines of this rank, for adapters up to ``service.max_rank`` on every projection."""
    peft_config(LoraSpec(), "warm-up")  # importing peft takes seconds; not while tenants wait
    base = open_base(run)
    max_in_flight = service.max_in_flight or base.device.quantum_sequences
    max_tokens = service.max_tokens_per_microbatch or base.device.quantum_tokens
    run = dataclasses.replace(
        run,
        lora=LoraSpec(rank=service.max_rank),
        trainer=dataclasses.replace(run.trainer, max_tokens_per_microbatch=max_tokens),
        engine=dataclasses.replace(run.engine, sleep=False),  # it samples for one tenant while it trains for another
    )
    if base.mesh.world_size != base.mesh.tp_size:
        raise ConfigError(
            f"the service is one tensor-parallel group: torchrun started {base.mesh.world_size} processes, "
            f"parallel.tensor_parallel_size={base.mesh.tp_size}; make them equal"
        )
    pair = open_pair(run, base, num_adapters=service.trainer_adapters, num_sequences=max_in_flight)
    if not isinstance(pair.weight_sync, WeightSync):
        raise ConfigError("lora=none: the service trains adapters; every weight can be trained by the recipes")
    return Backend(
        trainer=pair.trainer,
        engine=pair.engine,
        weight_sync=pair.weight_sync,
        mesh=base.mesh,
        tp_size=base.mesh.tp_size,
        vocab_size=base.spec.vocab_size,
        pad_to_multiple_of=pair.trainer.token_multiple,
        max_lora_rank=service.max_rank,
        max_in_flight=max_in_flight,
        max_tokens_per_microbatch=max_tokens,
        host_threads=base.device.host_threads,
        memory=memory_of(run, base, pair),
        model=_model(run, base, pair.engine.max_prompt_tokens, local=service.auth == "local"),
    )


def memory_of(run: RunConfig, base: Base, pair: Pair) -> dict[str, float]:
    """What the engine may take: the KV cache's size, or its share of an accelerator's memory."""
    if run.engine.backend == "trainer":  # what its requests need
        return {}
    size = cache_bytes(run, base) or (pair.plan.cache_bytes if pair.plan is not None else None)
    if size is not None:
        return {"kv_cache_gib": round(size / 2**30, 2)}
    assert run.engine.gpu_memory_utilization is not None, "one of the three ways sized the cache"
    return {"gpu_memory_utilization": run.engine.gpu_memory_utilization}


def _model(run: RunConfig, base: Base, context_tokens: int, *, local: bool) -> Model:
    """``local``: clients are on this machine and find the tokenizer in the model's folder, hub or not."""
    from transformers import AutoTokenizer

    return Model(
        name=run.model.name_or_path,
        aliases=("base",),
        arch=base.spec.family,
        tokenizer_id=str(base.model.path) if local else run.model.name_or_path,
        context_tokens=context_tokens,
        tokenizer=AutoTokenizer.from_pretrained(base.model.path),
    )
