"""The table of faults: what is done, and what the user sees. docs/reliability.md is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.faults.actions import VICTIM


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row."""

    name: str
    what: str
    """In the words of the documentation."""
    sees: str
    """A regular expression that the output of the failed start matches."""
    fault: dict[str, Any] | None = None
    """Arguments of :class:`tests.faults.toy_run.Fault`."""
    damage: str | None = None
    """File of the newest checkpoint in which one byte is changed (or ``-name``, removed) after a kill at step 5."""
    how: str = "restarts"
    """``restarts``: the start fails, torchrun's restart finishes the run. ``stops``: exit code 0 after a checkpoint,
    the next start finishes it. ``refuses``: the next start names the file; without that folder it finishes."""
    continues_after: int = 2
    """The step of the checkpoint that is continued from; 0 is a new beginning."""
    timeout_s: float = 60.0
    in_ci: bool = False


LOST = r"Signal 9 \(SIGKILL\)|Connection (closed|reset) by peer"
KILLS = {
    "start": "while the start-up probe begins",
    "generate": "while the engine generates",
    "forward_backward": "before the backward pass",
    "optim": "after the optimizer step",
    "push": "between the copy into the slot and its proof",
    "checkpoint": "while it writes its part of a checkpoint",
}
CI = {"kill-generate-0", "kill-push-1", "kill-checkpoint-1", "kill-publish-0"}


def kills() -> list[Case]:
    """kill -9 of each rank in each phase."""
    cases = []
    for phase, words in KILLS.items():
        for rank in (0, 1):
            name = f"kill-{phase}-{rank}"
            cases.append(
                Case(
                    name=name,
                    what=f"kill -9 of rank {rank} {words}",
                    fault={"action": "kill", "phase": phase, "rank": rank},
                    sees=LOST,
                    continues_after=0 if phase == "start" else 2,
                    in_ci=name in CI,
                )
            )
    rows = [
        ("kill-publish-0", "kill -9 of rank 0 before a checkpoint gets its name", "kill", "publish", 2),
        ("kill-publish-1", "kill -9 of rank 1 before a checkpoint gets its name", "kill_other", "publish", None),
        ("kill-reward-0", "kill -9 of rank 0 while rewards are computed", "kill", "reward", 2),
        ("kill-reward-1", "kill -9 of rank 1 while it waits for rank 0's rewards", "kill_other", "reward", 2),
    ]
    for name, what, action, phase, after in rows:
        fault = {"action": action, "phase": phase}
        # rank 0 alone writes the last files, so a checkpoint may be complete when rank 1 dies beside it
        cases.append(Case(name=name, what=what, fault=fault, sees=LOST, continues_after=after or 4, in_ci=name in CI))
    return cases


def _raises(name: str, what: str, action: str, phase: str, sees: str, **rest: Any) -> Case:
    rank, step = rest.pop("rank", 0), rest.pop("step", 4)
    return Case(
        name=name,
        what=what,
        fault={"action": action, "phase": phase, "rank": rank, "step": step},
        sees=sees,
        **rest,
    )


def backends() -> list[Case]:
    """A backend raises, hangs, or the disk is full."""
    failure = "injected: device-side failure"
    late = r"watchdog: rank {}: .* has taken more than parallel.timeout_s=3"
    cases = [
        _raises("engine-raises-0", "the engine of rank 0 raises in the middle of a turn", "fail", "generate", failure),
        _raises("engine-raises-1", "the engine of rank 1 raises", "fail", "generate", failure, rank=1, in_ci=True),
        _raises("engine-raises", "the engines of all ranks raise", "fail", "generate", failure, rank=None),
        _raises("backward-raises-0", "the backward pass raises on rank 0", "fail", "forward_backward", failure),
        _raises("backward-raises-1", "the backward pass raises on rank 1", "fail", "forward_backward", failure, rank=1),
        _raises("optim-raises-1", "the optimizer step raises on rank 1", "fail", "optim", failure, rank=1),
        _raises("push-raises-0", "the copy into the slot raises on rank 0", "fail", "push", failure),
        _raises(
            "hang-generate-1",
            "the engine of rank 1 hangs; every rank's stacks are written",
            "hang",
            "generate",
            late.format(0),
            rank=1,
            timeout_s=3.0,
            in_ci=True,
        ),
        _raises(
            "hang-backward-0",
            "rank 0 hangs before the backward pass",
            "hang",
            "forward_backward",
            late.format(1),
            timeout_s=3.0,
        ),
        _raises("hang-push-1", "rank 1 hangs in a push", "hang", "push", late.format(0), rank=1, timeout_s=3.0),
    ]
    for rank in (0, 1):
        cases.append(
            _raises(
                f"disk-full-{rank}",
                f"the disk of rank {rank} is full when it writes a checkpoint",
                "full_disk",
                "checkpoint",
                r"StorageError: .*could not write .*free some space or change run_dir",
                rank=rank,
                in_ci=rank == 1,
            )
        )
    return cases


def rewards() -> list[Case]:
    """The user's code."""
    row = [
        (
            "raises",
            "a reward raises",
            "reward_raises",
            r"EnvironmentFailure: problem letters/\d+.*KeyError\('answer'\)",
        ),
        ("hangs", "a reward hangs", "hang", r"EnvironmentFailure: .*did not answer within timeout_s=2"),
        ("nan", "a reward is NaN", "reward_nan", r"EnvironmentFailure: .*returned reward=nan, not a finite number"),
        ("inf", "a reward is infinite", "reward_inf", r"EnvironmentFailure: .*returned reward=inf, not a finite"),
        ("text", "a reward is a string", "reward_text", r"EnvironmentFailure: .*returned reward='1.0', not a finite"),
    ]
    return [
        _raises(f"reward-{name}", what, action, "reward", sees, in_ci=name == "nan") for name, what, action, sees in row
    ]


def lockstep() -> list[Case]:
    """Rank 1 is about to do something else than rank 0."""
    differ = r"LockstepError: the ranks disagree before {}:(\n|.)*rank 0: (\n|.)*rank 1: "
    rows = [
        ("prompt", "rank 1 is given another prompt", "other_prompt", "generate"),
        ("seed", "rank 1 is given another seed", "other_seed", "generate"),
        ("temperature", "rank 1 is given another temperature", "other_temperature", "generate"),
        ("step", "rank 1 is a step ahead", "other_step", "generate"),
        ("version", "rank 1 has counted another version", "other_version", "push"),
    ]
    return [
        _raises(
            f"lockstep-{name}",
            what,
            action,
            "optim",
            differ.format(before),
            rank=1,
            continues_after=2 if before == "push" else 4,
            in_ci=name == "prompt",
        )
        for name, what, action, before in rows
    ]


def delivery() -> list[Case]:
    """The engine does not hold what the trainer pushed, or does not use it."""
    differs = r"DeliveryError: policy@\d+: the engine's slot differs from the trainer's shard in "
    rows: list[tuple[Any, ...]] = [
        ("flipped-bit-0", "one bit of rank 0's slot flips", "flip_bit", "generate", differs + VICTIM, 0),
        ("flipped-bit-1", "one bit of rank 1's slot flips", "flip_bit", "generate", differs + VICTIM, 1),
        ("evicted", "a slot is evicted and comes back with the version before", "evict", "generate", differs, None),
        ("push-ignored", "a push leaves the slot as it was", "forget_load", "push", differs, None),
        ("push-skipped", "the trainer goes on without a push", "move_trainer", "generate", differs + VICTIM, None),
        ("dropped", "a module is not exported", "drop_module", "optim", f"DeliveryError: .*{VICTIM} was not", None),
        (
            "renamed",
            "a module is exported under another name",
            "rename_module",
            "optim",
            f"DeliveryError: .*{VICTIM} was not pushed",
            None,
        ),
        ("duplicated", "a module is exported twice", "duplicate_module", "optim", f"DeliveryError: .*{VICTIM}", None),
    ]
    cases = [
        _raises(f"delivery-{name}", what, action, phase, sees, rank=rank, in_ci=name in ("flipped-bit-1", "dropped"))
        for name, what, action, phase, sees, rank in rows
    ]
    gate = r"MismatchError: step 5: parity/\w+=.* is beyond the limit"
    for name, what, action in (
        ("gate-raw-logprobs", "the engine reports logprobs at temperature 1, sampling at 0.7", "raw_logprobs"),
        ("gate-stale-adapter", "the engine samples from an older version than its slot holds", "stale_kernels"),
        ("gate-base-model", "the engine samples from the base model", "base_only"),
    ):
        cases.append(_raises(name, what, action, "optim", gate, rank=None, continues_after=4))
    return cases


def stops() -> list[Case]:
    """SIGTERM: a checkpoint after the step, exit code 0, and the next start goes on."""
    return [
        _raises(
            f"sigterm-{name}",
            f"SIGTERM to {words}",
            "terminate",
            "generate",
            r"stopped by SIGTERM after step 3; continue with \+resume=auto",
            rank=rank,
            step=3,
            how="stops",
            continues_after=3,
            in_ci=rank == 1,
        )
        for name, words, rank in (("0", "rank 0", 0), ("1", "rank 1 only", 1), ("all", "all ranks", None))
    ]


def damages() -> list[Case]:
    """The newest checkpoint is damaged between two starts."""
    rows = [
        (
            "rank-0",
            "rank_00000.safetensors",
            "a byte of rank 0's tensors is changed",
            "rank_00000.safetensors is damaged",
        ),
        (
            "rank-1",
            "rank_00001.safetensors",
            "a byte of rank 1's tensors is changed",
            "rank_00001.safetensors is damaged",
        ),
        ("meta", "meta.json", "a byte of meta.json is changed", "meta.json is damaged"),
        ("config", "config.json", "a byte of config.json is changed", "config.json is damaged"),
        (
            "manifest",
            "MANIFEST.json",
            "a byte of the manifest is changed",
            r"(MANIFEST\.json|rank_0000\d\.\w+) is missing",
        ),
        ("missing", "-rank_00001.safetensors", "rank 1's tensors are missing", "rank_00001.safetensors is missing"),
    ]
    return [
        Case(
            name=f"damaged-{name}",
            what=f"in the newest checkpoint {what}",
            damage=file,
            how="refuses",
            sees=rf"CheckpointError: .*{sees}.*remove .*step_000004 to resume from an older checkpoint",
            in_ci=name == "rank-1",
        )
        for name, file, what, sees in rows
    ]


CASES = {
    case.name: case for case in (*kills(), *backends(), *rewards(), *lockstep(), *delivery(), *stops(), *damages())
}
