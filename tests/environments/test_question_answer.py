"""Question and answer data sets: columns, instructions, splits, and errors that name file and row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from framework.data.chat import Chat
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.environments.question_answer import BOXED, last_boxed
from framework.errors import DataError
from framework.types import Completion
from tests.fakes import tiny_tokenizer

CHAT = Chat(tiny_tokenizer())


def write(path: Path, *rows: Mapping[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(name: str, split: str = "train", **args: object) -> Any:
    return build_problems(EnvironmentConfig(name=name, args=args), CHAT, split=split, seed=0)


def asked(problems: Any, index: int = 0) -> str:
    text = CHAT.decode(problems.make(index).observe().token_ids)
    return text.rpartition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n<|im_start|>assistant\n")


def earned(problems: Any, said: str, index: int = 0) -> float:
    token_ids = CHAT.tokens(said + CHAT.eos_token)
    completion = Completion(
        token_ids=token_ids, sampling_logprobs=(0.0,) * len(token_ids), stop_reason="stop", adapter=None
    )
    reward: float = problems.make(index).step(completion).reward
    return reward


def test_columns_and_an_instruction_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "2+2?", "a": 4})
    problems = build("dataset", path=path, question="q", answer="a", instruction="Number only.")
    assert asked(problems) == "2+2?\n\nNumber only."
    assert (earned(problems, "4"), earned(problems, "5")) == (1.0, 0.0)
    assert problems.problem_id(0) == "a/train/0"


def test_every_tenth_row_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"question": str(i), "answer": "x"} for i in range(25)))
    train, heldout = build("dataset", path=path), build("dataset", "heldout", path=path)
    assert [asked(heldout, i) for i in range(len(heldout))] == ["9", "19"]
    assert [asked(train, i) for i in range(len(train))] == [str(i) for i in range(25) if i not in (9, 19)]


def test_a_folder_has_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"question": "a", "answer": "x"})
    write(tmp_path / "dev.jsonl", {"question": "b", "answer": "x"})
    assert asked(build("dataset", "heldout", path=str(tmp_path), heldout_split="dev")) == "b"


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "He has 1,000 + 72 <<1000+72=1072>>.\n#### 1,072"}
    write(tmp_path / "train.jsonl", row)
    problems = build("gsm8k", path=str(tmp_path))
    assert asked(problems) == f"How many?\n\n{BOXED}"
    assert (earned(problems, "so \\boxed{1072}"), earned(problems, "\\boxed{72}")) == (1.0, 0.0)


def test_math(tmp_path: Path) -> None:
    row = {"problem": "x?", "solution": "It is \\boxed{2}, no, $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}
    write(tmp_path / "train.jsonl", row)
    problems = build("math", path=str(tmp_path))
    assert (earned(problems, "\\boxed{0.5}"), earned(problems, "\\boxed{2}")) == (1.0, 0.0)


def test_the_reward_can_be_another(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"question": "How many?", "answer": "#### 7"})
    config = EnvironmentConfig(
        name="gsm8k", args={"path": str(tmp_path)}, reward="framework.environments.rewards.last_number"
    )
    problems = build_problems(config, CHAT, split="train", seed=0)
    assert earned(problems, "3 and then 7 apples") == 1.0


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("dataset", {"q": "?"}, r"train\.jsonl, row 2: needs 'question', a non-empty string; it has the keys \['q'\]"),
        ("gsm8k", {"question": "?", "answer": "72"}, r"row 2: 'answer' has no '####'"),
        ("math", {"problem": "?", "solution": "72"}, r"row 2: 'solution' has no \\boxed"),
        ("math", {"problem": "?", "solution": "\\boxed{7"}, r"row 2: 'solution' has a \\boxed\{ that is not closed"),
    ],
)
def test_a_malformed_row_names_itself(tmp_path: Path, name: str, row: Mapping[str, object], message: str) -> None:
    write(tmp_path / "train.jsonl", {"question": "?", "answer": "x"}, row)
    with pytest.raises(DataError, match=message):
        build(name, path=str(tmp_path)).make(1)


def test_last_boxed_balances_braces() -> None:
    assert last_boxed("\\boxed{a} and \\boxed {b^{c^{d}} + {e}} end") == "b^{c^{d}} + {e}"
