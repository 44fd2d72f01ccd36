"""One rank of a small GRPO run into which a fault is put.

Real are the recipe, the mesh (gloo), collect(), the weight sync with its proofs, the start-up probe, the gate, the
checkpoints, the watchdog and the tracker; the trainer and the engine are the bigram model of tests/service/toy.py,
which really trains and really samples. A fault acts once, at one step of one phase on one rank (or all), and
only in the first start: what torchrun starts again is sound.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, ItemsView, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from framework.algorithms.base import LossFn
from framework.batching import Batch
from framework.checkpoint import CheckpointStore
from framework.config import RunConfig, to_typed
from framework.device import open_device
from framework.distributed import Mesh, close_mesh, open_mesh
from framework.engine.base import SampleRequest, StepOutput
from framework.environments.base import StepResult
from framework.errors import FrameworkError
from framework.lora.spec import TARGETS, LoraSpec
from framework.models.hub import ResolvedModel
from framework.pair import Base
from framework.probe import probe_delivery
from framework.runtime import SamplingRuntime, open_records
from framework.trainer.base import ForwardBackwardResult, ForwardResult, LoraShard, OptimResult
from framework.types import AdapterRef, Completion, Prompt
from framework.weight_sync import VersionCounter, WeightSync
from recipes import grpo
from tests.faults.actions import ACTIONS
from tests.service.toy import VOCAB, AsciiTokenizer, ToyEngine, ToyTrainer, _log_softmax, module

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens, where and when."""

    action: str
    """A key of :data:`tests.faults.actions.ACTIONS`."""
    phase: str
    """start, generate, reward, forward_backward, optim, push, checkpoint (half a file written) or publish (all files
    written, not yet renamed)."""
    step: int = 4
    rank: int | None = 0
    """None is every rank."""


class Injector:
    """Knows this rank's parts and sets the fault off when its moment comes."""

    def __init__(self, fault: Fault | None, mesh: Mesh) -> None:
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.fault = fault if first_start else None
        self.mesh = mesh
        self.pids = mesh.all_gather(os.getpid())
        self.trainer: Trainer
        self.engine: Engine
        self.sync: WeightSync
        self.reward: Any = None
        """What the reward returns instead of its value; None is sound."""

    def reach(self, phase: str, step: int) -> None:
        """Called wherever a fault can happen."""
        fault = self.fault
        if fault is None or (phase, step) != (fault.phase, fault.step) or fault.rank not in (None, self.mesh.rank):
            return
        self.fault = None
        ACTIONS[fault.action](self)


class Trainer(ToyTrainer):
    """The toy trainer, the same on every rank."""

    token_multiple = 1

    def __init__(self) -> None:
        super().__init__()
        self.injector: Injector
        self.temperature = 1.0
        self.rename: Callable[[str], str | None] = lambda path: path

    def _logprobs(self, microbatch: Any, factors: Any, scale: float) -> tuple[Tensor, Tensor]:
        table, self.table = self.table, self.table / self.temperature
        try:
            return super()._logprobs(microbatch, factors, scale / self.temperature)
        finally:
            self.table = table

    def forward(self, name: str | None, batch: Batch) -> ForwardResult:
        self.temperature = batch.temperature
        return super().forward(name, batch)

    def forward_backward(self, name: str, batch: Batch, loss_fn: LossFn) -> ForwardBackwardResult:
        self.temperature = batch.temperature
        self.injector.reach("forward_backward", int(self.loaded[name].tensors["step"]) + 1)
        return super().forward_backward(name, batch, loss_fn)

    def optim_step(self, name: str, params: Any) -> OptimResult:
        result = super().optim_step(name, params)
        self.injector.reach("optim", result.step)
        return result

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        named = {self.rename(path): shard for path, shard in super().adapter_shards(name).items()}
        return {path: shard for path, shard in named.items() if path is not None}


class Engine(ToyEngine):
    """The toy engine, the same on every rank."""

    def __init__(self) -> None:
        super().__init__(max_adapters=2)
        self.injector: Injector
        self.raw_logprobs = False
        self.serve: dict[str, LoraShard] | None = None
        """Sampled from instead of the slot, when set."""
        self.history: list[dict[str, LoraShard]] = []

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        super().load_adapter(ref, spec, shards)
        self.history.append({path: LoraShard(a=s.a.clone(), b=s.b.clone()) for path, s in self.slots[ref].items()})
        if ref.name == "policy":
            self.injector.reach("push", int(self.injector.trainer.loaded["policy"].tensors["step"]))

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        """Every projection of the model, zero where nothing was loaded, as the real engine answers."""
        rank = next(iter(self.slots[ref].values())).a.shape[0]
        empty = LoraShard(a=torch.zeros(rank, VOCAB), b=torch.zeros(VOCAB, rank))
        return {**{module(target): empty for target in TARGETS}, **self.slots[ref]}

    def step(self) -> StepOutput:
        for request_id in self.flights:
            if request_id.startswith("rollout/") and len(self.flights[request_id].tokens) == 2:
                self.injector.reach("generate", int(request_id.split("/")[1]))
                break
        return super().step()

    def _column(self, token: int, ref: AdapterRef | None) -> Any:
        if ref is None or self.serve is None:
            return super()._column(token, ref)
        held, self.slots[ref] = self.slots[ref], self.serve
        try:
            return super()._column(token, ref)
        finally:
            self.slots[ref] = held

    def _advance(self, flight: Any) -> Any:
        current = flight.tokens[-1] if flight.tokens else flight.request.prompt.token_ids[-1]
        stop = super()._advance(flight)
        if self.raw_logprobs:
            flight.logprobs[-1] = float(_log_softmax(self._column(current, flight.request.adapter))[flight.tokens[-1]])
        return stop


class OtherRequests(Mesh):
    """A mesh whose rank can be made to hear something else than its leader said."""

    alter: Callable[[SampleRequest], SampleRequest] | None = None

    def run_on_leader(self, work: Callable[[], T]) -> T:
        heard: Any = super().run_on_leader(work)
        alter = type(self).alter
        if alter is not None and isinstance(heard, tuple) and heard and isinstance(heard[0], SampleRequest):
            heard = (alter(heard[0]), *heard[1:])
        return heard  # type: ignore[no-any-return]


class HalfWritten(dict[str, Tensor]):
    """A rank's state whose writing can be interrupted."""

    reach: Callable[[], None]

    def items(self) -> ItemsView[str, Tensor]:
        self.reach()
        return super().items()


class Store(CheckpointStore):
    """The checkpoint store, with the moments at which a fault can happen."""

    injector: Injector

    def save(self, step: int, state: Mapping[str, Tensor], **rest: Any) -> Path:
        watched = HalfWritten(state)
        watched.reach = lambda: self.injector.reach("checkpoint", step)
        return super().save(step, watched, **rest)

    def _complete(self, temporary: Path, final: Path, *args: Any, **rest: Any) -> None:
        self.injector.reach("publish", int(final.name.removeprefix("step_")))
        super()._complete(temporary, final, *args, **rest)


class Letters:
    """Rewards how often the model says one letter."""

    def __init__(self, index: int, reach: Callable[[], Any]) -> None:
        self._index, self._reach = index, reach

    def __repr__(self) -> str:
        return f"Letters({self._index})"

    def observe(self) -> Prompt:
        return Prompt(token_ids=tuple(b"say e:"[: 3 + self._index % 4]))

    def step(self, completion: Completion) -> StepResult:
        value = self._reach()
        score = sum(token % 3 == 0 for token in completion.token_ids) / len(completion.token_ids)
        return StepResult(reward=score if value is None else value, done=True)


class LetterProblems:
    """Twelve of them; ``reach`` is called for every reward of the training split."""

    reach: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, split: str) -> None:
        self._split = split

    def __len__(self) -> int:
        return 12

    def problem_id(self, index: int) -> str:
        return f"letters/{index}"

    def make(self, index: int) -> Letters:
        return Letters(index, type(self).reach if self._split == "train" else lambda: None)


def letters(chat: Any, *, split: str, seed: int) -> LetterProblems:
    """``environment.name=tests.faults.toy_run.letters``."""
    return LetterProblems(split)


def config(run_dir: Path, *, timeout_s: float) -> RunConfig:
    """Six steps, a checkpoint after every second."""
    return to_typed(
        {
            "num_steps": 6,
            "run_dir": str(run_dir),
            "resume": "auto",
            "model": {"name_or_path": "toy/bigram", "dtype": "float32"},
            "parallel": {"timeout_s": timeout_s},
            "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]},
            "environment": {"name": "tests.faults.toy_run.letters"},
            "sampling": {"max_tokens": 6, "temperature": 0.7},
            "rollout": {"prompts_per_step": 2, "group_size": 4, "timeout_s": 2.0},
            "optimizer": {"learning_rate": 0.3},
            "evaluation": {"every": 0, "num_problems": 2},
            "checkpoint": {"every": 2, "keep": 3},
            "tracking": {"wandb": "off", "tensorboard": False},
        }
    )


def open_toy(cfg: RunConfig, fault: Fault | None) -> SamplingRuntime:
    """Like :func:`framework.runtime.open_sampling`, with the toys as backends."""
    device = open_device("cpu", local_rank=0)
    plain = open_mesh(device, tensor_parallel_size=int(os.environ["WORLD_SIZE"]), timeout_s=cfg.parallel.timeout_s)
    mesh = OtherRequests(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(Mesh)})
    mesh.watchdog.folder = Path(str(cfg.run_dir))
    injector = Injector(fault, mesh)
    trainer, engine = Trainer(), Engine()
    sync = WeightSync(trainer, engine, VersionCounter(), synchronize=lambda: None, check_lockstep=mesh.check_lockstep)
    trainer.injector = engine.injector = Store.injector = injector
    injector.trainer, injector.engine, injector.sync = trainer, engine, sync
    LetterProblems.reach = staticmethod(lambda: reward_of(injector))
    injector.reach("start", 4)
    probe_delivery(trainer, engine, sync, cfg.lora, vocab_size=VOCAB, dtype=torch.float32)
    model = ResolvedModel(path=Path(str(cfg.run_dir)), source="the toy")
    spec: Any = None
    base = Base(device=device, mesh=mesh, model=model, spec=spec, dtype=torch.float32)
    chat: Any = AsciiTokenizer()
    records = open_records(cfg, base)
    records["store"] = Store(records["run_dir"] / "checkpoints", keep=cfg.checkpoint.keep, ranks=mesh)
    return SamplingRuntime(
        base=base, trainer=trainer, chat=chat, engine=engine, weight_sync=sync, sleeps=False, **records
    )


def reward_of(injector: Injector) -> Any:
    """What a faulty reward returns instead of its value, once."""
    injector.reward = None
    injector.reach("reward", int(injector.trainer.loaded["policy"].tensors["step"]) + 1)
    return injector.reward


def on_rank(run_dir: str, fault: Mapping[str, Any] | None, timeout_s: float) -> None:
    """What torchrun starts. Errors of the user's end as launch/train.py ends them."""
    torch.set_num_threads(1)
    cfg = config(Path(run_dir), timeout_s=timeout_s)
    try:
        grpo.run(cfg, open_toy(cfg, None if fault is None else Fault(**fault)))
        close_mesh()
    except FrameworkError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except Exception:  # noqa: BLE001 - printed as the interpreter would
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
