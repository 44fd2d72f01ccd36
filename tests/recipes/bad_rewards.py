"""An environment whose reward the configuration chooses, and rewards that a user gets wrong."""

from framework.data.chat import Chat
from framework.environments.base import Problems, Reward
from framework.environments.single_turn import SingleTurnProblems


def problems(chat: Chat, *, split: str, seed: int, reward: Reward) -> Problems:
    """``environment.name=tests.recipes.bad_rewards.problems``."""
    rows = [{"question": f"say {n}", "answer": str(n)} for n in range(4)]
    return SingleTurnProblems(rows, name="say", chat=chat, reward=reward)


def raises(completion: str, **row: object) -> float:
    """Stumbles."""
    raise KeyError("answer")


def not_a_number(completion: str, **row: object) -> float:
    """Divides nothing by nothing, so to speak."""
    return float("nan")
