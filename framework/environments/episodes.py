"""What only the leader of a tensor-parallel group does in collect(): environments, rewards, assembling rollouts.

:mod:`framework.rollout` decides when; nothing here talks to an engine or to other ranks.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from framework.engine.base import SampleRequest
from framework.environments.base import Environment, Problems, StepResult
from framework.environments.workers import Call, Workers
from framework.errors import ConfigError, EnvironmentFailure, FrameworkError
from framework.types import Completion, Prompt, Rollout, RolloutGroup, SamplingParams, StopReason


def request_seed(*, seed: int, step: int, attempt: int, index: int, rollout: int, turn: int) -> int:
    """A 63-bit seed for one completion: the same in every process and run, unlike Python's ``hash``."""
    text = f"{seed}/{step}/{attempt}/{index}/{rollout}/{turn}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """collect()'s arguments that the leader needs throughout."""

    sampling: SamplingParams
    seed: int
    step: int
    attempt: int
    max_turns: int
    timeout_s: float


@dataclass(slots=True, kw_only=True)
class Episode:
    """One rollout in the making."""

    index: int
    number: int
    """Among the rollouts of this problem in this call."""
    problem_id: str
    environment: Environment
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    num_turns: int = 0
    stop_reason: StopReason = "stop"

    def extend(self, prompt: Prompt) -> None:
        """Appends what the environment added to the conversation."""
        seen = len(self.token_ids)
        if list(prompt.token_ids[:seen]) != self.token_ids or (seen and len(prompt.token_ids) == seen):
            pairs = zip(self.token_ids, prompt.token_ids, strict=False)
            where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(seen, len(prompt.token_ids)))
            raise EnvironmentFailure(
                f"problem {self.problem_id}, turn {self.num_turns + 1}: observe() of {self.environment!r} must start "
                f"with the {seen} tokens the model already saw and add to them; it has {len(prompt.token_ids)} and "
                f"differs at position {where}. Append token ids, do not render the conversation again"
            )
        new = prompt.token_ids[seen:]
        self.token_ids.extend(new)
        self.loss_mask.extend([False] * len(new))
        self.sampling_logprobs.extend([0.0] * len(new))

    def add_completion(self, completion: Completion) -> None:
        self.token_ids.extend(completion.token_ids)
        self.loss_mask.extend([True] * len(completion.token_ids))
        self.sampling_logprobs.extend(completion.sampling_logprobs)
        self.stop_reason = completion.stop_reason
        self.num_turns += 1

    def add_result(self, result: StepResult) -> None:
        for name, value in {"reward": result.reward, **result.metrics}.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise EnvironmentFailure(
                    f"problem {self.problem_id}: {self.environment!r} returned {name}={value!r}, not a finite number"
                )
        self.reward += float(result.reward)
        for name, value in result.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + float(value)

    def rollout(self) -> Rollout:
        return Rollout(
            token_ids=tuple(self.token_ids),
            loss_mask=tuple(self.loss_mask),
            sampling_logprobs=tuple(self.sampling_logprobs),
            reward=self.reward,
            adapter=None,
            stop_reason=self.stop_reason,
            num_turns=self.num_turns,
            metrics=self.metrics,
        )


class Leader:
    """What only tensor-parallel rank 0 does: environments, rewards, assembling rollouts."""

    def __init__(self, problems: Problems, plan: Plan, workers: Workers, *, max_tokens_in_context: int) -> None:
        self._problems = problems
        self._plan = plan
        self._workers = workers
        self._context = max_tokens_in_context
        self._episodes: list[Episode] = []
        self._by_request: dict[str, int] = {}
        self.generate_s = 0.0
        self.reward_s = 0.0
        self._turn_started_s = 0.0

    def start(self, indices: Sequence[int], group_size: int) -> tuple[SampleRequest, ...]:
        """Makes the environments and returns the first turn's requests."""
        numbers: Counter[int] = Counter()
        for index in indices:
            for _ in range(group_size):
                self._episodes.append(self._make(index, numbers[index]))
                numbers[index] += 1
        for key, episode in enumerate(self._episodes):
            self._workers.submit(key, episode.environment.observe)
        return self._requests(self._answers())

    def give(self, request_id: str, completion: Completion) -> None:
        """Hands a completion to its environment, which runs while the engine goes on."""
        key = self._by_request.pop(request_id)
        episode = self._episodes[key]
        episode.add_completion(completion)
        last_turn = episode.num_turns >= self._plan.max_turns
        self._workers.submit(key, lambda: _advance(episode.environment, completion, last_turn=last_turn))

    def next_turn(self) -> tuple[SampleRequest, ...]:
        """Waits for the rewards of this turn; the requests of the next one, none when every rollout is done."""
        self.generate_s += time.monotonic() - self._turn_started_s
        waiting: dict[int, Prompt] = {}
        for key, answer in self._answers().items():
            assert isinstance(answer, _Advanced)
            self._episodes[key].add_result(answer.result)
            if answer.prompt is not None:
                waiting[key] = answer.prompt
        return self._requests(waiting)

    def groups(self, group_size: int) -> tuple[RolloutGroup, ...]:
        """Every rollout, ``adapter`` still None, in the order of the indices."""
        return tuple(
            RolloutGroup(rollouts=tuple(e.rollout() for e in members), problem_id=members[0].problem_id)
            for members in (self._episodes[i : i + group_size] for i in range(0, len(self._episodes), group_size))
        )

    def _make(self, index: int, number: int) -> Episode:
        try:
            environment = self._problems.make(index)
            problem_id = self._problems.problem_id(index)
        except FrameworkError:
            raise
        except Exception as error:
            raise EnvironmentFailure(f"problem {index} of {self._problems!r} cannot be made: {error!r}") from error
        return Episode(index=index, number=number, problem_id=problem_id, environment=environment)

    def _answers(self) -> dict[int, object]:
        """Everything pending, by episode in order, so that the first failing episode is the one reported."""
        started = time.monotonic()
        calls: dict[int, Call] = {}
        while self._workers.num_pending:
            call = self._workers.next_ended()
            if call.timed_out:
                self._fail(call)
            calls[call.key] = call
        self.reward_s += time.monotonic() - started
        for key in sorted(calls):
            if calls[key].error is not None:
                self._fail(calls[key])
        return {key: calls[key].value for key in sorted(calls)}

    def _fail(self, call: Call) -> None:
        episode = self._episodes[call.key]
        where = f"problem {episode.problem_id}, turn {max(episode.num_turns, 1)}: {episode.environment!r}"
        if call.timed_out:
            raise EnvironmentFailure(f"{where} did not answer within timeout_s={self._plan.timeout_s}")
        if isinstance(call.error, FrameworkError):
            raise type(call.error)(f"{where}: {call.error}") from call.error
        raise EnvironmentFailure(f"{where} raised {call.error!r}") from call.error

    def _requests(self, prompts: Mapping[int, object]) -> tuple[SampleRequest, ...]:
        requests: list[SampleRequest] = []
        for key, prompt in prompts.items():
            assert isinstance(prompt, Prompt)
            episode = self._episodes[key]
            if len(prompt.token_ids) + self._plan.sampling.max_tokens > self._context:
                if episode.num_turns:  # a conversation that outgrew the context ends as a truncated one
                    episode.stop_reason = "length"
                    continue
                raise ConfigError(
                    f"problem {episode.problem_id}: its prompt has {len(prompt.token_ids)} tokens, which with "
                    f"sampling.max_tokens={self._plan.sampling.max_tokens} exceeds the engine's context of "
                    f"{self._context}; lower sampling.max_tokens, raise engine.max_model_len, or drop long prompts"
                )
            episode.extend(prompt)
            requests.append(self._request(key, episode, prompt))
        self._turn_started_s = time.monotonic()
        return tuple(requests)

    def _request(self, key: int, episode: Episode, prompt: Prompt) -> SampleRequest:
        plan, turn = self._plan, episode.num_turns
        seed = request_seed(
            seed=plan.seed, step=plan.step, attempt=plan.attempt, index=episode.index, rollout=episode.number, turn=turn
        )
        request_id = f"rollout/{plan.step}/{plan.attempt}/{episode.index}/{episode.number}/{turn}"
        self._by_request[request_id] = key
        sampling = replace(plan.sampling, seed=seed)
        return SampleRequest(request_id=request_id, prompt=prompt, sampling=sampling, adapter=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Advanced:
    result: StepResult
    prompt: Prompt | None
    """None when the rollout ends here."""


def _advance(environment: Environment, completion: Completion, *, last_turn: bool) -> _Advanced:
    result = environment.step(completion)
    return _Advanced(result=result, prompt=None if result.done or last_turn else environment.observe())
