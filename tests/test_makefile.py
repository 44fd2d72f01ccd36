"""The make targets say what they run; nothing is run here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def plan(*arguments: str) -> list[str]:
    """The commands of ``make arguments``."""
    return [line.strip() for line in make("--dry-run", *arguments).splitlines()]


def make(*arguments: str) -> str:
    """What ``make`` prints, as if not called from ``make test`` with variables of its own."""
    inherited = ("NPROC", "MODEL", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("arguments", "fetch", "overrides"),
    [
        (["NPROC=1"], "hub", ""),
        (["NPROC=3"], "hub", ""),
        (["NPROC=2"], "hub tiny-random/qwen3", "model.name_or_path=tiny-random/qwen3"),
        (["NPROC=2", "MODEL=a/b"], "hub a/b", "model.name_or_path=a/b"),
        (["ARGS=seed=3 model.dtype=float32"], "hub", "seed=3 model.dtype=float32"),
    ],
)
def test_grpo_fetches_what_it_trains(arguments: list[str], fetch: str, overrides: str) -> None:
    ranks = next((a.removeprefix("NPROC=") for a in arguments if a.startswith("NPROC=")), "1")
    assert [" ".join(command.split()) for command in plan("grpo", *arguments)] == [
        "bash launch/env/setup.sh",
        f".venv/bin/python -m framework.models.{fetch}",
        " ".join(
            f".venv/bin/torchrun --standalone --nproc_per_node={ranks} launch/train.py +recipe=grpo {overrides}".split()
        ),
    ]


def test_a_model_among_the_arguments_replaces_the_default_everywhere() -> None:
    commands = plan("sft", "NPROC=2", "ARGS=model.name_or_path=a/b")
    assert not any("hub" in command or "tiny-random" in command for command in commands)
    assert commands[-1].endswith("launch/train.py +recipe=sft  model.name_or_path=a/b")


def test_every_target_is_in_the_help() -> None:
    listed = make("help")
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert {line.split()[1] for line in listed.splitlines() if line.startswith("  make ")} == set(phony.split()[1:])


def test_an_unknown_hardware_is_refused() -> None:
    done = subprocess.run(
        ["bash", "launch/env/setup.sh"],
        cwd=ROOT,
        env={**os.environ, "HARDWARE": "tpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "HARDWARE=tpu: must be cpu or gpu\n")
