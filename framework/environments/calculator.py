"""An example of several turns with a tool: sums too large to guess, and a calculator that the model may ask.

The model writes ``<calc>17*23</calc>`` and is told the result, as often as it likes, until it writes
``<answer>391</answer>``. The tool is spoken to in plain text, so any chat model can use it.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping

from framework.data.chat import Chat, Message
from framework.environments.base import StepResult
from framework.environments.conversation import Conversation
from framework.errors import ConfigError
from framework.types import Completion, Prompt

INSTRUCTION = (
    "You can use a calculator: write <calc>17*23</calc> and you will be told the result. "
    "When you know the final number, write it as <answer>391</answer>."
)
MAX_NUMBER = 10**30
_CALC = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPERATORS: Mapping[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class CalculatorEnvironment:
    """One sum. Reward 1.0 for the right answer; metrics ``correct`` and ``calls``, the uses of the calculator."""

    def __init__(self, chat: Chat, *, expression: str) -> None:
        self._right = calculate(expression)
        messages: list[Message] = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"What is {expression}?"},
        ]
        self._chat = chat
        self._talk = Conversation(chat, messages)

    def __repr__(self) -> str:
        return "CalculatorEnvironment()"

    def observe(self) -> Prompt:
        return self._talk.prompt()

    def step(self, completion: Completion) -> StepResult:
        text = self._chat.text(completion)
        answers = _ANSWER.findall(text)
        if answers:
            correct = float(answers[-1].strip() == str(self._right))
            return StepResult(reward=correct, done=True, metrics={"correct": correct})
        asked = _CALC.findall(text)
        if not asked:
            return StepResult(reward=0.0, done=True, metrics={"correct": 0.0})
        self._talk.answer(completion, [{"role": "user", "content": _reply(asked[-1])}])
        return StepResult(reward=0.0, done=False, metrics={"calls": 1.0})


class CalculatorProblems:
    """Products and sums of three numbers of ``num_digits`` digits, from the seed.

    Raises:
        ConfigError: a number of digits that makes no sense.
        DataError: the chat template does not keep a conversation's prefix.
    """

    def __init__(self, chat: Chat, *, split: str, seed: int, size: int, num_digits: int) -> None:
        if not 1 <= num_digits <= 8:
            raise ConfigError(f"environment.args.num_digits={num_digits}: must be between 1 and 8")
        chat.check_prefix("user")
        self._chat = chat
        self._split = split
        self._expressions = _draw(split, seed, size, num_digits)

    def __repr__(self) -> str:
        return f"CalculatorProblems({self._split}, {len(self)} problems)"

    def __len__(self) -> int:
        return len(self._expressions)

    def problem_id(self, index: int) -> str:
        return f"calculator/{self._split}/{index}"

    def make(self, index: int) -> CalculatorEnvironment:
        return CalculatorEnvironment(self._chat, expression=self._expressions[index])


def calculator(
    chat: Chat, *, split: str, seed: int, size: int = 2000, heldout_size: int = 256, num_digits: int = 3
) -> CalculatorProblems:
    """The builder of the catalog. Needs ``rollout.max_turns`` of 2 or more."""
    return CalculatorProblems(
        chat, split=split, seed=seed, size=size if split == "train" else heldout_size, num_digits=num_digits
    )


def calculate(expression: str) -> int:
    """The value of whole numbers with ``+``, ``-``, ``*`` and brackets.

    Raises:
        ValueError: anything else, or a number beyond :data:`MAX_NUMBER`.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("not a sum") from error


def _value(node: ast.AST) -> int:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("only whole numbers, +, -, * and brackets")
    if abs(value) > MAX_NUMBER:
        raise ValueError("the number is too large")
    return value


def _reply(expression: str) -> str:
    try:
        return f"Result: {calculate(expression)}"
    except ValueError as error:
        return f"The calculator says: {error}."


def _draw(split: str, seed: int, size: int, num_digits: int) -> list[str]:
    """Different expressions; held-out are those whose three numbers add up to a multiple of 5."""
    rng = random.Random(f"calculator/{split}/{seed}")
    low, high = 10 ** (num_digits - 1), 10**num_digits - 1
    expressions: dict[str, None] = {}
    for _ in range(100 * size):
        if len(expressions) == size:
            break
        numbers = [rng.randint(low, high) for _ in range(3)]
        if (sum(numbers) % 5 == 0) == (split == "heldout"):
            a, b, c = numbers
            expressions[f"{a} * {b} + {c}"] = None
    return list(expressions)
