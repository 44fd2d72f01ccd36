"""Engine and trainer of the same model, and the way from one to the other. The only importer of the backends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framework.config import RunConfig
from framework.device import DTYPES, Device, open_device
from framework.distributed import Mesh, open_mesh
from framework.engine.base import EngineProfile, RolloutEngine
from framework.errors import ConfigError
from framework.memory import CachePlan, Demand, check_start, kv_bytes_per_token, measure_trainer, plan_cache
from framework.models.hub import ResolvedModel, default_cache_dir, resolve_model
from framework.models.layout import projections
from framework.models.spec import ModelSpec, read_spec
from framework.models.weights import check_checkpoint, load_shard
from framework.shared_weights import SharedWeights
from framework.trainer.base import Trainer
from framework.weight_sync import VersionCounter, WeightSync


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What trainer and engine are built on."""

    device: Device
    mesh: Mesh
    model: ResolvedModel
    spec: ModelSpec
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Engine and trainer of the same model, and the way from one to the other."""

    engine: Any
    trainer: Trainer
    weight_sync: WeightSync | SharedWeights
    sleeps: bool
    """The engine must sleep while the trainer works."""
    plan: CachePlan | None
    """How the memory was divided; None where the cache's size was configured."""


def open_base(cfg: RunConfig) -> Base:
    """Joins the ranks, finds the model and checks that it can be split."""
    if cfg.model.dtype not in DTYPES:
        raise ConfigError(f"model.dtype={cfg.model.dtype!r}: must be one of {sorted(DTYPES)}")
    device = open_device(cfg.hardware.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = open_mesh(
        device,
        tensor_parallel_size=cfg.parallel.tensor_parallel_size or world_size,
        timeout_s=cfg.parallel.timeout_s,
    )
    with mesh.agree_on_error("finding the model"):
        model = resolve_model(cfg.model.name_or_path, cache_dir=default_cache_dir())
        spec = read_spec(model.path)
        spec.check_tensor_parallel(mesh.tp_size)
        check_checkpoint(model.path, spec)
    return Base(device=device, mesh=mesh, model=model, spec=spec, dtype=DTYPES[cfg.model.dtype])


def open_pair(cfg: RunConfig, base: Base, *, num_adapters: int = 1, num_sequences: int | None = None) -> Pair:
    """Starts both sides. All ranks must call it. On an accelerator the trainer works on the engine's tensors.

    Args:
        num_adapters: whose state the trainer will hold at once.
        num_sequences: as many as will be sampled at once; None for as many as the engine takes.

    Raises:
        ConfigError: the memory of an accelerator is too small for both; settings that would do are named. Or every
            weight is to be trained where the engine keeps them in a layout of its own.
    """
    if cfg.lora is None:
        check_shares_weights(cfg, base)
    if cfg.numerics == "exact":
        check_exact(cfg, base)
    plan = None
    engine: Any
    if cfg.engine.backend == "trainer":
        trainer = open_trainer(cfg, base, load_weights(base))
        engine = open_trainer_engine(cfg, base, trainer)
    elif cache_bytes(cfg, base) is None and cfg.engine.gpu_memory_utilization is None:
        at_once = min(cfg.engine.max_num_seqs, num_sequences or cfg.engine.max_num_seqs)
        engine, trainer, plan = _open_measured(cfg, base, num_adapters, at_once)
    else:
        engine = open_engine(cfg, base)
        weights = engine.base_weights() if base.device.shares_weights else load_weights(base)
        trainer = open_trainer(cfg, base, weights)
    sync = (WeightSync if cfg.lora is not None else SharedWeights)(
        trainer,
        engine,
        VersionCounter(),
        synchronize=base.device.synchronize,
        check_lockstep=base.mesh.check_lockstep,
    )
    sleeps = plan.sleeps if plan is not None else bool(cfg.engine.sleep)
    return Pair(engine=engine, trainer=trainer, weight_sync=sync, sleeps=sleeps, plan=plan)


def check_shares_weights(cfg: RunConfig, base: Base) -> None:
    """Refuses to train every weight where the engine would not see it.

    Raises:
        ConfigError: with the ways out.
    """
    if not base.device.shares_weights and cfg.engine.backend == "vllm":
        raise ConfigError(
            f"lora=none with recipe={cfg.recipe}: the trainer writes into the weights the engine samples with, but on "
            f"a {base.device.kind} vLLM repacks them into a layout of its own; use a GPU (hardware=gpu), sample "
            f"with the trainer's own model (engine.backend=trainer), train an adapter, or fine-tune without sampling "
            f"(+recipe=sft)"
        )


def check_exact(cfg: RunConfig, base: Base) -> None:
    """Refuses ``numerics=exact`` where trainer and engine are not made of the same kernels.

    Raises:
        ConfigError: with what would have to be otherwise.
    """
    device, tp_size, head_dim = base.device.kind, base.mesh.tp_size, base.spec.head_dim
    dropout = 0.0 if cfg.lora is None else cfg.lora.dropout
    for refused, reason in (
        (
            not base.device.has_invariant_attention,
            f"hardware.device={device}, it needs kernels that both sides share, of an NVIDIA Hopper GPU",
        ),
        (tp_size > 1, f"parallel.tensor_parallel_size={tp_size}, the engine sums over ranks in another order"),
        (base.dtype is not torch.bfloat16, f"model.dtype={cfg.model.dtype}, it was made and measured in bfloat16"),
        (cfg.trainer.backend != "megatron", f"trainer.backend={cfg.trainer.backend}, only megatron has the kernels"),
        (cfg.engine.backend != "vllm", f"engine.backend={cfg.engine.backend}, only vllm has the kernels"),
        (
            dropout > 0.0,
            f"lora.dropout={dropout}, the trainer would score tokens with parts of the adapter dropped",
        ),
        (
            not _has_one_tile(head_dim),
            f"heads of {head_dim}, which the attention kernel works on in other tiles for a token than for a prompt",
        ),
    ):
        if refused:
            raise ConfigError(f"numerics=exact with {reason}; use numerics=fast")


def _has_one_tile(head_dim: int) -> bool:
    """Whether FlashAttention 3 cuts the keys alike for prompts and through the pages of a cache (vllm 0.26.0)."""
    return head_dim <= 64 or 96 < head_dim <= 128 or 192 < head_dim <= 256


def cache_bytes(cfg: RunConfig, base: Base) -> int | None:
    """Of the KV cache, as configured or as usual for the device; None leaves it to the engine's start."""
    if cfg.engine.kv_cache_gib is not None:
        return int(cfg.engine.kv_cache_gib * 2**30)
    return base.device.kv_cache_bytes


def _open_measured(cfg: RunConfig, base: Base, num_adapters: int, num_sequences: int) -> tuple[Any, Trainer, CachePlan]:
    """The engine with a KV cache of what the trainer, made from the engine's weights meanwhile, leaves."""
    context = min(cfg.engine.max_model_len, base.spec.max_position_embeddings)
    demand = Demand(
        microbatch_tokens=cfg.trainer.max_tokens_per_microbatch,
        recompute=cfg.trainer.recompute,
        num_adapters=num_adapters,
        lora_rank=0 if cfg.lora is None else cfg.lora.rank,
        context_tokens=context,
        num_sequences=num_sequences,
        bytes_per_token=kv_bytes_per_token(base.spec, tp_size=base.mesh.tp_size, dtype=base.dtype),
        reserve_bytes=int(cfg.engine.memory_reserve_gib * 2**30),
        sleep=cfg.engine.sleep,
    )
    made: list[tuple[Trainer, CachePlan]] = []

    def free_everywhere() -> int:
        base.device.synchronize()
        base.device.release_cached()
        return min(base.mesh.all_gather(base.device.memory_free()))

    def size_cache(profile: EngineProfile) -> int:
        trainer = open_trainer(cfg, base, profile.base_weights)
        footprint = measure_trainer(
            trainer,
            base.device,
            cfg.lora,
            vocab_size=base.spec.vocab_size,
            num_tokens=demand.microbatch_tokens,
            max_length=min(context, demand.microbatch_tokens),
        )
        footprint = max(base.mesh.all_gather(footprint), key=lambda f: f.step_of(demand.microbatch_tokens))
        activation = max(base.mesh.all_gather(profile.activation_bytes))
        plan = plan_cache(demand, footprint, free_bytes=free_everywhere(), activation_bytes=activation)
        made.append((trainer, plan))
        return plan.cache_bytes

    engine = open_engine(cfg, base, size_cache)
    ((trainer, plan),) = made
    check_start(plan, free_bytes=free_everywhere())
    return engine, trainer, plan


def load_weights(base: Base) -> dict[str, torch.Tensor]:
    """This rank's shard of the checkpoint."""
    with base.mesh.agree_on_error("loading the weights"):
        return load_shard(
            base.model.path,
            base.spec,
            tp_rank=base.mesh.tp_rank,
            tp_size=base.mesh.tp_size,
            dtype=base.dtype,
            device=base.device.torch_device,
        )


def open_trainer(cfg: RunConfig, base: Base, weights: Mapping[str, torch.Tensor]) -> Trainer:
    """The configured training backend."""
    if cfg.trainer.backend == "megatron":
        from framework.engine.vllm.attention import open_attention
        from framework.trainer.megatron.trainer import MegatronTrainer

        return MegatronTrainer(
            base.spec,
            weights,
            mesh=base.mesh,
            device=base.device,
            dtype=base.dtype,
            sequence_parallel=cfg.parallel.sequence_parallel,
            recompute=cfg.trainer.recompute,
            attention=open_attention(base.device),
            exact=cfg.numerics == "exact",
        )
    from framework.trainer.hf.trainer import HfTrainer

    if base.mesh.world_size > 1:
        raise ConfigError(f"trainer.backend=hf runs in one process, torchrun started {base.mesh.world_size}")
    return HfTrainer(base.model.path, device=base.device, dtype=base.dtype)


def open_teacher(base: Base, name_or_path: str) -> Trainer:
    """Another model, whole on this rank and in this run's dtype, to compute logprobs of this run's tokens with.

    Raises:
        ConfigError: its tokenizer gives tokens other numbers.
        ModelError: there is no such model.
    """
    from transformers import AutoTokenizer

    from framework.trainer.hf.trainer import HfTrainer

    with base.mesh.agree_on_error("opening the teacher"):
        model = resolve_model(name_or_path, cache_dir=default_cache_dir())
        mine, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (base.model.path, model.path))
        if mine != theirs:
            raise ConfigError(
                f"distill.teacher={name_or_path}: its tokenizer differs from the student's, so their logprobs are not "
                f"of the same tokens ({len(theirs)} and {len(mine)} tokens); use a model of the same family"
            )
        return HfTrainer(model.path, device=base.device, dtype=base.dtype)


def open_engine(cfg: RunConfig, base: Base, size_cache: Callable[[EngineProfile], int] | None = None) -> Any:
    """vLLM in this process; see VllmEngine for ``size_cache``."""
    from framework.engine.vllm.engine import VllmEngine, VllmOptions

    eager = cfg.engine.enforce_eager if cfg.engine.enforce_eager is not None else not base.device.captures_graphs
    targets = () if cfg.lora is None else cfg.lora.targets
    parents = {p.parent.rpartition(".")[2] for p in projections(base.spec, targets)}
    options = VllmOptions(
        max_model_len=min(cfg.engine.max_model_len, base.spec.max_position_embeddings),
        max_num_seqs=cfg.engine.max_num_seqs,
        max_num_batched_tokens=cfg.engine.max_num_batched_tokens,
        max_adapters=0 if cfg.lora is None else cfg.engine.max_adapters,
        max_lora_rank=0 if cfg.lora is None else cfg.lora.rank,
        lora_parents=tuple(sorted(parents)),
        kv_cache_bytes=cache_bytes(cfg, base),
        gpu_memory_utilization=cfg.engine.gpu_memory_utilization,
        enforce_eager=eager,
        enable_prefix_caching=cfg.engine.prefix_caching,
        exact=cfg.numerics == "exact",
    )
    return VllmEngine(
        base.model.path, options, mesh=base.mesh, device=base.device, dtype=base.dtype, size_cache=size_cache
    )


def open_trainer_engine(cfg: RunConfig, base: Base, trainer: Any) -> RolloutEngine:
    """Sampling with the trainer's own model."""
    from transformers import AutoTokenizer

    from framework.engine.trainer.engine import TrainerEngine, TrainerEngineOptions

    tokenizer = AutoTokenizer.from_pretrained(base.model.path)
    options = TrainerEngineOptions(
        max_model_len=min(cfg.engine.max_model_len, base.spec.max_position_embeddings),
        max_num_seqs=cfg.engine.max_num_seqs,
        max_adapters=cfg.engine.max_adapters,
        vocab_size=base.spec.vocab_size,
        end_tokens=end_tokens(base.model.path, tokenizer),
    )
    return TrainerEngine(trainer, tokenizer, options, watchdog=base.mesh.watchdog)


def end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's ``generation_config.json``."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    more = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in (tokenizer.eos_token_id, *more) if token is not None)
