"""collect(): what is asked of the engine, how rollouts are assembled, and that every rank gets the same or fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from framework.engine.base import SampleRequest, StepOutput
from framework.environments.base import Environment, StepResult
from framework.errors import ConfigError, EnvironmentFailure, StaleSampleError
from framework.rollout import CollectResult, Coordinator, collect
from framework.types import AdapterRef, Completion, Prompt, Rollout, SamplingParams
from tests.fakes import OneRank, ScriptedEngine, ThreadRanks

REF = AdapterRef(name="policy", version=3, content_hash="aa")
SAMPLING = SamplingParams(max_tokens=4, temperature=0.7)


class Counting:
    """Asks for ``turns`` completions; token 9 separates them. Reward: the sum of the sampled tokens."""

    def __init__(self, index: int, *, turns: int) -> None:
        self._tokens: tuple[int, ...] = (100 + index,)
        self._turns = turns

    def __repr__(self) -> str:
        return "Counting()"

    def observe(self) -> Prompt:
        return Prompt(token_ids=self._tokens)

    def step(self, completion: Completion) -> StepResult:
        self._tokens = (*self._tokens, *completion.token_ids, 9)
        self._turns -= 1
        return StepResult(reward=float(sum(completion.token_ids)), done=self._turns == 0, metrics={"calls": 1.0})


class MadeBy:
    """Problems whose environments come from one function of the index."""

    def __init__(self, make: Callable[[int], Environment]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 10

    def problem_id(self, index: int) -> str:
        return f"made/{index}"

    def make(self, index: int) -> Environment:
        return self._make(index)


class Stepping(Counting):
    """A Counting whose step runs ``action`` first and returns what it returns, if anything."""

    def __init__(self, index: int, action: Callable[[int], Any]) -> None:
        super().__init__(index, turns=1)
        self._index = index
        self._action = action

    def step(self, completion: Completion) -> StepResult:
        answer = self._action(self._index)
        result = super().step(completion)
        return result if answer is None else replace(result, reward=answer)


def answer(request: SampleRequest) -> tuple[int, ...]:
    """One to three tokens, from the request's seed."""
    assert request.sampling.seed is not None
    return tuple(1 + (request.sampling.seed >> 8 * i) % 7 for i in range(1 + request.sampling.seed % 3))


def play(
    problems: MadeBy,
    indices: Sequence[int] = (0, 1),
    *,
    engine: ScriptedEngine | None = None,
    coordinator: Coordinator | None = None,
    group_size: int = 2,
    sampling: SamplingParams = SAMPLING,
    seed: int = 0,
    step: int = 0,
    attempt: int = 0,
    max_turns: int = 1,
    timeout_s: float = 10.0,
    ref: AdapterRef | None = REF,
) -> CollectResult:
    return collect(
        engine or ScriptedEngine(answer),
        ref,
        problems,
        indices,
        group_size=group_size,
        sampling=sampling,
        seed=seed,
        step=step,
        attempt=attempt,
        coordinator=coordinator or OneRank(),
        timeout_s=timeout_s,
        max_turns=max_turns,
    )


def on_every_rank(engines: Sequence[ScriptedEngine], run: Callable[[int, Coordinator], CollectResult]) -> list[object]:
    """What ``run`` gave or raised on each rank."""
    ranks = ThreadRanks(len(engines)).ranks
    outcomes: list[object] = [None] * len(engines)

    def rank(number: int) -> None:
        try:
            outcomes[number] = run(number, ranks[number])
        except Exception as error:  # noqa: BLE001 - returned to the test
            outcomes[number] = error

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return outcomes


def test_groups_follow_the_indices_and_rollouts_hold_every_token() -> None:
    engine = ScriptedEngine(lambda request: (request.prompt.token_ids[0], 5))
    result = play(MadeBy(lambda index: Counting(index, turns=1)), [4, 2], engine=engine)
    assert [group.problem_id for group in result.groups] == ["made/4", "made/2"]
    rollout = result.groups[0].rollouts[1]
    assert rollout == Rollout(
        token_ids=(104, 104, 5),
        loss_mask=(False, True, True),
        sampling_logprobs=(0.0, -0.104, -0.005),
        reward=109.0,
        adapter=REF,
        stop_reason="stop",
        num_turns=1,
        metrics={"calls": 1.0},
    )


def test_every_request_asks_for_the_version_the_sampling_and_its_own_seed() -> None:
    engine = ScriptedEngine(answer)
    play(MadeBy(lambda index: Counting(index, turns=2)), engine=engine, max_turns=2)
    assert len(engine.submitted) == 8
    assert {request.adapter for request in engine.submitted} == {REF}
    assert {replace(request.sampling, seed=None) for request in engine.submitted} == {SAMPLING}
    assert len({request.sampling.seed for request in engine.submitted}) == 8
    assert len({request.request_id for request in engine.submitted}) == 8
    assert engine.most_in_flight == 4  # a turn's completions run together


def test_seeds_repeat_in_another_run_and_differ_by_seed_step_and_attempt() -> None:
    def seeds(seed: int = 0, step: int = 0, attempt: int = 0) -> list[int | None]:
        engine = ScriptedEngine(answer)
        problems = MadeBy(lambda index: Counting(index, turns=1))
        play(problems, engine=engine, seed=seed, step=step, attempt=attempt)
        return [request.sampling.seed for request in engine.submitted]

    # blake2b("0/0/0/0/0/0"), 8 bytes, big endian, >> 1: the same on every machine and Python.
    assert seeds()[0] == 5536999174479715446
    assert seeds() == seeds()
    assert not set(seeds()) & (set(seeds(seed=1)) | set(seeds(step=1)) | set(seeds(attempt=1)))


def test_the_same_problem_twice_gets_other_seeds() -> None:
    engine = ScriptedEngine(answer)
    play(MadeBy(lambda index: Counting(index, turns=1)), [3, 3], engine=engine)
    assert len({request.sampling.seed for request in engine.submitted}) == 4


def test_turns_are_joined_without_tokenising_again() -> None:
    engine = ScriptedEngine(lambda request: (len(request.prompt.token_ids),))
    result = play(MadeBy(lambda index: Counting(index, turns=3)), [0], engine=engine, group_size=1, max_turns=5)
    (rollout,) = result.groups[0].rollouts
    assert rollout.token_ids == (100, 1, 9, 3, 9, 5)
    assert rollout.loss_mask == (False, True, False, True, False, True)
    assert rollout.sampling_logprobs == (0.0, -0.001, 0.0, -0.003, 0.0, -0.005)
    assert (rollout.reward, rollout.num_turns, rollout.metrics) == (9.0, 3, {"calls": 3.0})


def test_a_rollout_ends_at_max_turns_or_when_the_context_is_full() -> None:
    problems = MadeBy(lambda index: Counting(index, turns=99))
    engine = ScriptedEngine(lambda request: (1,), max_prompt_tokens=9)
    (capped,) = play(problems, [0], engine=engine, group_size=1, max_turns=2).groups[0].rollouts
    assert (capped.num_turns, capped.stop_reason) == (2, "stop")
    # Turns start with 1, 3, 5, 7 tokens; 7 + 4 is over 9.
    (full,) = play(problems, [0], engine=engine, group_size=1, max_turns=99).groups[0].rollouts
    assert (full.num_turns, full.stop_reason, len(full.token_ids)) == (3, "length", 6)


def test_a_first_prompt_that_does_not_fit_names_the_problem_and_the_key() -> None:
    engine = ScriptedEngine(answer, max_prompt_tokens=4)
    with pytest.raises(ConfigError, match=r"made/0: its prompt has 1 tokens, .*sampling.max_tokens=4 exceeds .* of 4"):
        play(MadeBy(lambda index: Counting(index, turns=1)), engine=engine)
    assert engine.submitted == []


def test_all_ranks_submit_the_same_and_return_the_same_with_their_own_adapter_ref() -> None:
    engines = [ScriptedEngine(answer) for _ in range(3)]
    refs = [replace(REF, content_hash=f"rank{rank}") for rank in range(3)]
    problems = MadeBy(lambda index: Counting(index, turns=2))
    nothing = MadeBy(lambda index: pytest.fail("environments are made on the leader only"))

    def run(rank: int, coordinator: Coordinator) -> CollectResult:
        mine = problems if rank == 0 else nothing
        return play(mine, engine=engines[rank], coordinator=coordinator, ref=refs[rank], max_turns=2)

    results = on_every_rank(engines, run)
    asked = [[(r.request_id, r.prompt, r.sampling) for r in engine.submitted] for engine in engines]
    assert len(asked[0]) == 8
    assert asked[0] == asked[1] == asked[2]
    for rank, result in enumerate(results):
        assert isinstance(result, CollectResult), result
        assert {rollout.adapter for group in result.groups for rollout in group.rollouts} == {refs[rank]}
        assert [group.rewards for group in result.groups] == [
            group.rewards for group in play(problems, max_turns=2).groups
        ]


def raise_on_one(index: int) -> None:
    if index == 1:
        raise KeyError("answer")


def hang_on_one(index: int) -> None:
    if index == 1:
        threading.Event().wait()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (raise_on_one, r"problem made/1, turn 1: Counting\(\) raised KeyError\('answer'\)"),
        (hang_on_one, r"problem made/1, turn 1: Counting\(\) did not answer within timeout_s=0.3"),
        (lambda index: float("nan"), r"problem made/0: Counting\(\) returned reward=nan, not a finite number"),
        (lambda index: float("-inf"), "returned reward=-inf, not a finite number"),
        (lambda index: "1.0", "returned reward='1.0', not a finite number"),
    ],
)
def test_a_bad_reward_fails_every_rank_alike_and_soon(action: Callable[[int], Any], message: str) -> None:
    engines = [ScriptedEngine(answer) for _ in range(2)]
    problems = MadeBy(lambda index: Stepping(index, action))
    started = time.monotonic()
    outcomes = on_every_rank(
        engines, lambda rank, coordinator: play(problems, engine=engines[rank], coordinator=coordinator, timeout_s=0.3)
    )
    assert time.monotonic() - started < 15  # the hanging reward hangs for ever
    for outcome in outcomes:
        assert isinstance(outcome, EnvironmentFailure), outcome
        with pytest.raises(EnvironmentFailure, match=message):
            raise outcome
    assert not any(engine.has_unfinished() for engine in engines)


class Rewriting(Counting):
    """Changes a token that the model has already seen."""

    def observe(self) -> Prompt:
        first, *rest = super().observe().token_ids
        return Prompt(token_ids=(first + len(rest), *rest))


def test_an_environment_that_rewrites_the_conversation_is_refused() -> None:
    with pytest.raises(EnvironmentFailure, match=r"made/0, turn 2: .* differs at position 0. Append token ids"):
        play(MadeBy(lambda index: Rewriting(index, turns=2)), max_turns=2)


class OtherVersion(ScriptedEngine):
    """Samples from version 4 whatever it is asked for."""

    def step(self) -> StepOutput:
        output = super().step()
        other = AdapterRef(name="policy", version=4, content_hash="bb")
        return replace(output, finished={key: replace(value, adapter=other) for key, value in output.finished.items()})


def test_a_sample_of_another_version_is_refused() -> None:
    with pytest.raises(StaleSampleError, match="asked for policy@3, the engine sampled policy@4"):
        play(MadeBy(lambda index: Counting(index, turns=1)), engine=OtherVersion(answer))


class RefusesThird(ScriptedEngine):
    """Takes two requests."""

    def submit(self, request: SampleRequest) -> None:
        if len(self.submitted) == 2:
            raise ConfigError("no")
        super().submit(request)


def test_a_refused_request_leaves_nothing_in_the_engine() -> None:
    engine = RefusesThird(answer)
    with pytest.raises(ConfigError):
        play(MadeBy(lambda index: Counting(index, turns=1)), engine=engine)
    assert not engine.has_unfinished()


class Patient(ScriptedEngine):
    """Goes on after its first step only once a reward has begun."""

    def __init__(self, reward_begun: threading.Event) -> None:
        super().__init__(lambda request: (1,) * (1 if request.prompt.token_ids == (100,) else 3))
        self._reward_begun = reward_begun

    def step(self) -> StepOutput:
        if self.num_steps:
            assert self._reward_begun.wait(timeout=20), "no reward was computed while completions were being sampled"
        return super().step()


def test_rewards_run_while_the_engine_samples_and_beside_each_other() -> None:
    begun = threading.Event()
    all_four = threading.Barrier(4, timeout=20)

    def meet(index: int) -> None:
        begun.set()
        all_four.wait()

    play(MadeBy(lambda index: Stepping(index, meet)), engine=Patient(begun))
    assert all_four.n_waiting == 0
    assert not all_four.broken


def test_time_in_rewards_is_apart_from_time_in_the_engine() -> None:
    result = play(MadeBy(lambda index: Stepping(index, lambda _: time.sleep(1.0))), [0], group_size=1)
    assert float(result.metrics["time/reward_s"].sum) > 0.9
    assert float(result.metrics["time/generate_s"].sum) < 0.9
