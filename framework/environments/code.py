"""Programming problems: the model writes Python, hidden tests run it in the sandbox.

What the sandbox contains and what not is said in sandbox.py. Within it, the tests run in the same process as the
completion: one that ends the process early or prints what it likes gains nothing, because a test counts only when it
is confirmed with a word that reaches the process after the completion has run; one that rewrites the running tests
could still cheat.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from framework.data.chat import Chat
from framework.environments.question_answer import dataset
from framework.environments.sandbox import SandboxLimits, run_python
from framework.environments.single_turn import SingleTurnProblems

INSTRUCTION = "Answer with one Python code block and nothing else."
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_HARNESS = Path(__file__).with_name("code_harness.py")


class CodeTests:
    """``reward(completion, tests=[...])``: the share of tests that pass, in [0, 1].

    Args:
        all_or_nothing: 1.0 if every test passes, else 0.0.
        wall_s: limit of one completion's run, all its tests together.
        memory_mib: limit of its memory.
    """

    def __init__(self, *, all_or_nothing: bool = False, wall_s: float = 10.0, memory_mib: int = 512) -> None:
        self._all_or_nothing = all_or_nothing
        self._limits = SandboxLimits(wall_s=wall_s, cpu_s=max(1, round(wall_s)), memory_mib=memory_mib)

    def __call__(self, completion: str, *, tests: Sequence[str] | str, **_: object) -> float:
        """Runs the completion's last code block, then each test.

        Args:
            completion: what the model said.
            tests: Python statements, mostly assertions; one that raises has failed.

        Raises:
            EnvironmentFailure: this machine allows no sandbox.
            ValueError: there is not one test.
        """
        wanted = [tests] if isinstance(tests, str) else list(tests)
        if not wanted:
            raise ValueError("'tests' is empty, so every program would be right")
        source = extract_code(completion)
        if source is None:
            return 0.0
        passed = run_tests(source, wanted, limits=self._limits)
        return float(passed == len(wanted)) if self._all_or_nothing else passed / len(wanted)


def extract_code(completion: str) -> str | None:
    """The last fenced block of Python; None if there is none."""
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else None


def run_tests(source: str, tests: Sequence[str], *, limits: SandboxLimits) -> int:
    """How many of the tests pass after ``source`` has run. None do when it raises, ends early or takes too long.

    Raises:
        EnvironmentFailure: this machine allows no sandbox.
    """
    word = secrets.token_hex(16)
    request = json.dumps({"source": source}) + "\n" + json.dumps({"tests": list(tests), "word": word}) + "\n"
    result = run_python(_HARNESS.read_text(), stdin=request, limits=limits)
    confirmed = {line for line in result.stdout.splitlines() if line.startswith(word)}
    return sum(f"{word} {number}" in confirmed for number in range(len(tests)))


def code(
    chat: Chat,
    *,
    split: str,
    seed: int,
    path: str,
    config: str | None = None,
    train_split: str = "train",
    heldout_split: str = "test",
    question: str = "question",
    instruction: str | None = INSTRUCTION,
    system: str | None = None,
    all_or_nothing: bool = False,
    wall_s: float = 10.0,
    memory_mib: int = 512,
) -> SingleTurnProblems:
    """The builder of the catalog: rows with a question and ``tests``, a list of Python statements.

    Args: as :func:`framework.environments.question_answer.dataset` and :class:`CodeTests`.
    """
    return dataset(
        chat,
        split=split,
        seed=seed,
        path=path,
        config=config,
        train_split=train_split,
        heldout_split=heldout_split,
        question=question,
        instruction=instruction,
        system=system,
        reward=CodeTests(all_or_nothing=all_or_nothing, wall_s=wall_s, memory_mib=memory_mib),
    )
