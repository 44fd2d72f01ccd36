"""MathVerify: equal is right however it is written, and an answer made to run for ever earns nothing, soon."""

from __future__ import annotations

import threading
import time

import pytest

from framework.environments.math_answers import MathVerify


@pytest.fixture(scope="module")
def verify() -> MathVerify:
    return MathVerify(num_processes=1, timeout_s=60.0)


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [
        ("so \\boxed{72}", "72", 1.0),
        ("The answer is 72.", "72", 1.0),
        ("so \\boxed{71}", "72", 0.0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("$\\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("first 72, no: \\boxed{3}", "72", 0.0),
        ("I do not know", "72", 0.0),
        ("", "72", 0.0),
        ("1,234 apples", "1234", 1.0),
    ],
)
def test_answers_are_compared_as_mathematics(verify: MathVerify, said: str, answer: str, reward: float) -> None:
    assert verify(said, answer=answer, question="ignored") == reward


def test_a_reference_that_cannot_be_read_is_an_error(verify: MathVerify) -> None:
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        verify("\\boxed{1}", answer="")


def test_an_answer_that_would_run_for_ever_earns_nothing_and_the_next_is_judged() -> None:
    verify = MathVerify(num_processes=1, timeout_s=8.0)
    assert verify("\\boxed{1}", answer="1") == 1.0
    started = time.monotonic()
    assert verify("\\boxed{9^{9^{9^{9}}}}", answer="1") == 0.0
    assert time.monotonic() - started < 60
    assert verify("\\boxed{2}", answer="2") == 1.0


def test_threads_share_the_processes(verify: MathVerify) -> None:
    rewards: dict[int, float] = {}

    def judge(number: int) -> None:
        rewards[number] = verify(f"\\boxed{{{number}}}", answer=str(number - number % 2))

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {number: float(number % 2 == 0) for number in range(8)}
