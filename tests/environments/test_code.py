"""Code rewards: the share of tests that pass, and completions that try to be paid for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.data.chat import Chat
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.environments.code import CodeTests, extract_code
from framework.environments.sandbox import run_python
from framework.errors import EnvironmentFailure
from framework.types import Completion
from tests.fakes import tiny_tokenizer


def contained() -> bool:
    try:
        run_python("")
    except EnvironmentFailure:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not contained(), reason="no user namespaces on this machine")
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'", "assert add(2, 2) == 5"]


def block(source: str) -> str:
    return f"Here it is:\n```python\n{source}\n```\nGood luck."


@needs_sandbox
@pytest.mark.parametrize(
    ("said", "reward"),
    [
        (block("def add(a, b):\n    return a + b"), 0.75),
        (block("def add(a, b):\n    return 3"), 0.25),
        (block("def add(a, b)\n    return a + b"), 0.0),
        (block("raise ValueError"), 0.0),
        ("def add(a, b): return a + b", 0.0),
        (block("def add(a, b): return 0") + block("def add(a, b): return a + b"), 0.75),
    ],
)
def test_the_share_of_tests_that_pass(said: str, reward: float) -> None:
    assert CodeTests()(said, tests=TESTS, question="ignored") == reward


@needs_sandbox
@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit()",
        "for i in range(4): print('passed', i)",
        "while True: pass",
        "import sys\nfor line in sys.stdin: print(line)",
        "x = [0] * 10**10",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "class Any:\n    def __eq__(self, other): raise SystemExit\ndef add(a, b): return Any()",
    ],
)
def test_a_completion_that_does_not_solve_it_earns_nothing(source: str) -> None:
    assert CodeTests(wall_s=2.0)(block(source), tests=TESTS) == 0.0


@needs_sandbox
def test_all_or_nothing() -> None:
    said = block("def add(a, b):\n    return a + b")
    assert CodeTests(all_or_nothing=True)(said, tests=TESTS) == 0.0
    assert CodeTests(all_or_nothing=True)(said, tests=TESTS[:3]) == 1.0
    assert CodeTests()(said, tests=TESTS[0]) == 1.0


@needs_sandbox
def test_the_environment_asks_for_a_block_and_runs_it(tmp_path: Path) -> None:
    row = {"question": "Write add(a, b).", "tests": TESTS[:2]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    chat = Chat(tiny_tokenizer())
    config = EnvironmentConfig(name="code", args={"path": str(tmp_path)})
    environment = build_problems(config, chat, split="train", seed=0).make(0)
    assert "Write add(a, b).\n\nAnswer with one Python code block" in chat.decode(environment.observe().token_ids)
    token_ids = chat.tokens(block("add = lambda a, b: a + b") + chat.eos_token)
    completion = Completion(
        token_ids=token_ids, sampling_logprobs=(0.0,) * len(token_ids), stop_reason="stop", adapter=None
    )
    assert environment.step(completion).reward == 1.0


def test_no_tests_is_an_error_not_a_reward() -> None:
    with pytest.raises(ValueError, match="every program would be right"):
        CodeTests()(block("x = 1"), tests=[])


def test_the_last_block_is_the_code() -> None:
    assert extract_code("```\na\n```\ntext\n```py\nb\n```") == "b\n"
    assert extract_code("```js\na\n```") is None
    assert extract_code("no code") is None
