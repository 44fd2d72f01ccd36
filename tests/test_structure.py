"""The architecture and the style that can be checked by reading: every rule holds, and every rule can fail."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import structure_rules
from tests.structure_rules import RULES, Source

ROOT = Path(__file__).resolve().parents[1]
LINE = '"""A module."""\n'


TOP = {".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
TOP |= {"benchmarks", "conf", "docs", "examples", "framework", "launch", "recipes", "tests"}
"""What lies in the root of the repository."""


def listed(*which: str) -> list[str]:
    """Paths from the root, as git lists them."""
    command = ["git", "ls-files", "-z", *which]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.split("\0") if name]


def tracked_texts() -> dict[str, str]:
    """Every text file that git has or would take, by path from the root."""
    texts = {}
    for name in listed("--cached", "--others", "--exclude-standard"):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:
            texts[name] = data.decode()
    return texts


def python_sources() -> list[Source]:
    """Every Python file of the repository."""
    return [Source(path, text) for path, text in tracked_texts().items() if path.endswith(".py")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Callable[[Sequence[Source]], list[str]]) -> None:
    sources = python_sources()
    assert len(sources) > 20
    assert rule(sources) == []


def test_nothing_is_committed_beside_the_houses_rooms() -> None:
    assert {name.partition("/")[0] for name in listed("--cached")} == TOP


def test_no_tracked_file_names_a_registry_or_a_machine() -> None:
    assert structure_rules.check_places(tracked_texts()) == []


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock"])
def test_locks_hold_exact_versions_only(name: str) -> None:
    lines = (ROOT / "launch" / "env" / name).read_text().splitlines()
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9a-z.+]+", line)] == []


BAD = [
    ("check_libraries", "framework/batching.py", "import vllm"),
    ("check_libraries", "framework/engine/base.py", "def f():\n    from vllm.lora import request"),
    ("check_libraries", "framework/trainer/hf/x.py", "from megatron.core import parallel_state"),
    ("check_libraries", "framework/checkpoint.py", "import wandb"),
    ("check_libraries", "recipes/grpo.py", "from omegaconf import DictConfig"),
    ("check_libraries", "framework/config.py", "import hydra"),
    ("check_libraries", "framework/client.py", "from fastapi import FastAPI"),
    ("check_layers", "framework/types.py", "import framework.batching"),
    ("check_layers", "framework/algorithms/losses.py", "from framework.trainer.base import Trainer"),
    ("check_layers", "framework/batching.py", "def f():\n    from framework.rollout import collect"),
    ("check_layers", "framework/checkpoint.py", "from framework import runtime"),
    ("check_layers", "framework/checkpoint.py", "from framework.runtime import Runtime"),
    ("check_layers", "framework/rollout.py", "from recipes import grpo"),
    ("check_layers", "recipes/grpo.py", "from launch import train"),
    ("check_layers", "framework/novelty.py", "x = 1"),
    ("check_backends", "recipes/grpo.py", "from framework.engine.vllm.engine import VllmEngine"),
    ("check_backends", "framework/pair.py", "import framework.trainer.hf"),
    ("check_backends", "framework/trainer/hf/x.py", "def f():\n    import framework.trainer.megatron.trainer"),
    ("check_cycles", "framework/types.py", "from framework.types import Datum"),
    ("check_torch_free", "framework/types.py", "import torch"),
    ("check_device_words", "recipes/sft.py", "x = torch.device('cuda:0')"),
    ("check_device_words", "framework/distributed.py", "dist.init_process_group('cpu:gloo,cuda:nccl')"),
    ("check_device_words", "framework/rollout.py", "torch.cuda.synchronize()"),
    ("check_device_words", "framework/rollout.py", "from torch.cuda import synchronize"),
    ("check_device_words", "framework/rollout.py", "x.cuda()"),
    ("check_sizes", "framework/x.py", "def f():\n" + "    x = 1\n" * 60),
    ("check_sizes", "tests/test_x.py", "x = 1\n" * 401),
    ("check_sizes", "launch/train.py", "x = 1\n" * 41),
    ("check_docstrings", "framework/x.py", "def f() -> None:\n    pass"),
    ("check_docstrings", "recipes/x.py", "class Public:\n    pass"),
    ("check_assertions", "tests/test_x.py", "def test_it():\n    print(1)"),
    ("check_assertions", "tests/test_x.py", "class TestX:\n    def test_it(self):\n        assert True"),
    ("check_no_patching", "tests/test_x.py", "from unittest import mock"),
    ("check_no_patching", "tests/test_x.py", "import unittest.mock"),
    ("check_no_patching", "tests/test_x.py", "mock.patch('a.b')"),
    ("check_no_patching", "tests/test_x.py", "def test_it(mocker): ..."),
    ("check_no_patching", "tests/test_x.py", "monkeypatch.setattr(a, 'b', 1)"),
    ("check_mirror", "tests/trainer/test_nothing.py", "x = 1"),
    ("check_mirror", "tests/recipes/test_nothing.py", "x = 1"),
]
GOOD = [
    ("check_libraries", "framework/engine/vllm/engine.py", "import vllm"),
    ("check_libraries", "tests/test_x.py", "import vllm"),
    ("check_layers", "framework/checkpoint.py", "from framework.batching import pack"),
    ("check_backends", "framework/pair.py", "def f():\n    from framework.trainer.hf import trainer"),
    ("check_backends", "framework/trainer/hf/x.py", "import framework.trainer.hf.y"),
    ("check_cycles", "framework/types.py", "def f():\n    from framework.types import Datum"),
    ("check_torch_free", "framework/types.py", "if TYPE_CHECKING:\n    import torch"),
    ("check_device_words", "framework/rollout.py", "raise ValueError('use hardware=cpu instead of cuda')"),
    ("check_device_words", "framework/rollout.py", "host = tensor.cpu()"),
    ("check_sizes", "framework/x.py", "def f():\n" + "    x = 1\n" * 59),
    ("check_docstrings", "framework/x.py", "def _f() -> None:\n    pass"),
    ("check_assertions", "tests/test_x.py", "def test_it():\n    torch.testing.assert_close(1, 1)"),
    ("check_assertions", "tests/test_x.py", "def test_it():\n    with pytest.raises(ValueError):\n        f()"),
    ("check_no_patching", "tests/test_x.py", "monkeypatch.setenv('A', '1')"),
    ("check_mirror", "tests/models/test_hub_download.py", "x = 1"),
    ("check_mirror", "tests/trainer/test_megatron_parity.py", "x = 1"),
]


HOUSE = tuple(
    Source(path, LINE)
    for path in ("framework/runtime.py", "framework/models/hub.py", "framework/trainer/megatron/trainer.py")
)


def judge(rule: str, path: str, code: str) -> list[str]:
    """What ``rule`` says about ``path`` if it held this code, in a house with a few other modules."""
    others = [source for source in HOUSE if source.path != path]
    complaints: list[str] = getattr(structure_rules, rule)([Source(path, f"{LINE}{code}\n"), *others])
    return [complaint for complaint in complaints if complaint.startswith(path.removesuffix(".py"))]


@pytest.mark.parametrize(("rule", "path", "code"), BAD)
def test_a_rule_catches_what_it_forbids(rule: str, path: str, code: str) -> None:
    assert len(judge(rule, path, code)) == 1


@pytest.mark.parametrize(("rule", "path", "code"), GOOD)
def test_a_rule_lets_pass_what_it_allows(rule: str, path: str, code: str) -> None:
    assert judge(rule, path, code) == []


def test_every_rule_is_shown_to_bite() -> None:
    assert {rule for rule, _, _ in BAD} == {rule.__name__ for rule in RULES}


def test_cycles_and_torch_are_found_through_other_modules() -> None:
    chain = [
        Source("framework/types.py", "import framework.lora.spec"),
        Source("framework/lora/spec.py", "import framework.errors"),
        Source("framework/errors.py", "import torch\nimport framework.types"),
    ]
    assert len(structure_rules.check_cycles(chain)) == 3
    assert len(structure_rules.check_torch_free(chain)) == 3


@pytest.mark.parametrize("place", ["https://pypi" + ".org/simple", "cd /" + "work/main", "'/" + "root/.cache'"])
def test_places_are_found(place: str) -> None:
    assert len(structure_rules.check_places({"docs/a.md": f"first\n{place}\n"})) == 1


@pytest.mark.parametrize("text", ["https://example.com/a/work/b", "~/work/x", "$ROOT/work", "net/root", "/workspace/a"])
def test_other_paths_are_not(text: str) -> None:
    assert structure_rules.check_places({"docs/a.md": text}) == []
