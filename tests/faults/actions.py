"""What a fault does when its moment comes; each gets the rank's injector."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from framework.engine.base import SampleRequest
from framework.trainer.base import LoraShard
from framework.types import Prompt

VICTIM = "model.layers.0.self_attn.v_proj"


def kill(run: Any) -> None:
    """kill -9 of this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_other(run: Any) -> None:
    """kill -9 of rank 1, which waits for this rank."""
    os.kill(run.pids[1], signal.SIGKILL)


def terminate(run: Any) -> None:
    """SIGTERM to this rank, as a cluster sends before it takes the machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


def fail(run: Any) -> None:
    """Raises what a backend raises when its device fails."""
    raise RuntimeError("injected: device-side failure")


def hang(run: Any) -> None:
    """Never comes back."""
    time.sleep(600)


def full_disk(run: Any) -> None:
    """No file of this rank can grow beyond 2000 bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def reward_raises(run: Any) -> None:
    """The user's reward has a bug."""
    raise KeyError("answer")


def reward_nan(run: Any) -> None:
    run.reward = float("nan")


def reward_inf(run: Any) -> None:
    run.reward = float("inf")


def reward_text(run: Any) -> None:
    run.reward = "1.0"


def _slot(run: Any) -> dict[str, LoraShard]:
    (slot,) = run.engine.slots.values()
    return slot  # type: ignore[no-any-return]


def flip_bit(run: Any) -> None:
    """One bit of the engine's slot."""
    _slot(run)[VICTIM].b.view(torch.int32)[3, 1] ^= 1


def evict(run: Any) -> None:
    """The slot is evicted and comes back with the version before."""
    _slot(run).update(run.engine.history[-2])


def forget_load(run: Any) -> None:
    """The push leaves the slot as it was."""
    _slot(run).update(run.engine.history[-2])


def move_trainer(run: Any) -> None:
    """The trainer's weights change without a push."""
    run.trainer.loaded["policy"].tensors["v_proj.b"] += 1e-3


def drop_module(run: Any) -> None:
    run.trainer.rename = lambda path: None if path == VICTIM else path


def rename_module(run: Any) -> None:
    run.trainer.rename = lambda path: path.replace("v_proj", "value_proj")


def duplicate_module(run: Any) -> None:
    """Two modules are exported from the same factors."""
    original: Callable[[str], Mapping[str, LoraShard]] = run.trainer.adapter_shards

    def shards(name: str) -> Mapping[str, LoraShard]:
        good = dict(original(name))
        return {**good, VICTIM: good[VICTIM.replace("v_proj", "q_proj")]}

    run.trainer.adapter_shards = shards


def raw_logprobs(run: Any) -> None:
    """The engine reports logprobs at temperature 1 of what it samples at 0.7."""
    run.engine.raw_logprobs = True


def stale_kernels(run: Any) -> None:
    """The engine samples from the first version while its slot holds the last."""
    run.engine.serve = run.engine.history[1]


def base_only(run: Any) -> None:
    """The engine samples from the base model whatever it is asked for."""
    run.engine.serve = {}


def _alter(run: Any, change: Callable[[SampleRequest], SampleRequest]) -> None:
    type(run.mesh).alter = staticmethod(change)


def other_prompt(run: Any) -> None:
    _alter(run, lambda r: replace(r, prompt=Prompt(token_ids=(*r.prompt.token_ids[:-1], 42))))


def other_seed(run: Any) -> None:
    _alter(run, lambda r: replace(r, sampling=replace(r.sampling, seed=1)))


def other_temperature(run: Any) -> None:
    _alter(run, lambda r: replace(r, sampling=replace(r.sampling, temperature=0.71)))


def other_step(run: Any) -> None:
    _alter(run, lambda r: replace(r, request_id=r.request_id.replace("rollout/5/", "rollout/6/")))


def other_version(run: Any) -> None:
    """This rank's version counter is ahead of the others'."""
    run.sync.versions.next()


ACTIONS: dict[str, Callable[[Any], None]] = {
    action.__name__: action
    for action in (
        kill,
        kill_other,
        terminate,
        fail,
        hang,
        full_disk,
        reward_raises,
        reward_nan,
        reward_inf,
        reward_text,
        flip_bit,
        evict,
        forget_load,
        move_trainer,
        drop_module,
        rename_module,
        duplicate_module,
        raw_logprobs,
        stale_kernels,
        base_only,
        other_prompt,
        other_seed,
        other_temperature,
        other_step,
        other_version,
    )
}
