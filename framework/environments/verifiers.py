"""Environments of the ``verifiers`` library, by their names: ``vf.load_environment(name)``.

A verifiers environment drives a rollout itself and asks a client for each completion; ours waits to be asked. The
adapter runs its coroutine on one event loop beside the engine and is its client: what it wants to send becomes
``observe()``, what the engine sampled becomes the client's response. Tokens are kept as they were sampled: a turn that
the environment adds is appended, and an environment that rewrites earlier turns is refused.

Written for verifiers 0.1.14, the last of the 0.1 line (0.2 replaced this API), which is not a dependency of this
project: ``pip install "verifiers==0.1.14"`` and the environment's own package.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import queue
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from framework.data.chat import Chat, Message, Tools
from framework.environments.base import StepResult
from framework.environments.conversation import Conversation
from framework.errors import ConfigError, EnvironmentFailure
from framework.types import Completion, Prompt

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The environment asks for a completion; ``reply`` takes it, on the event loop."""

    messages: tuple[Message, ...]
    tools: Tools | None
    reply: asyncio.Future[Completion]


class VerifiersProblems:
    """Rows of an environment's data set, each with a rollout coroutine of its own.

    Args:
        chat: renders the prompts; its template must keep a conversation's prefix.
        environment: a ``verifiers.Environment``.
        rows: of its data set.
        name: for problem ids.
    """

    def __init__(self, chat: Chat, environment: Any, rows: Sequence[Mapping[str, Any]], *, name: str) -> None:
        self._chat = chat
        self._environment = environment
        self._rows = rows
        self._name = name

    def __repr__(self) -> str:
        return f"VerifiersProblems({self._name}, {len(self)} problems)"

    def __len__(self) -> int:
        return len(self._rows)

    def problem_id(self, index: int) -> str:
        return f"{self._name}/{index}"

    def make(self, index: int) -> VerifiersEnvironment:
        return VerifiersEnvironment(self._chat, self._environment, self._rows[index], name=self._name)


class VerifiersEnvironment:
    """One rollout. The reward and the metrics are the rubric's, given with the last turn."""

    def __init__(self, chat: Chat, environment: Any, row: Mapping[str, Any], *, name: str) -> None:
        self._chat = chat
        self._environment = environment
        self._row = row
        self._name = name
        self._events: queue.SimpleQueue[Turn | Exception | dict[str, Any]] = queue.SimpleQueue()
        self._turn: Turn | None = None
        self._talk: Conversation | None = None
        self._sent: tuple[Message, ...] = ()

    def __repr__(self) -> str:
        return f"VerifiersEnvironment({self._name})"

    def observe(self) -> Prompt:
        if self._talk is None:
            asyncio.run_coroutine_threadsafe(self._run(), _loop())
            turn = self._next()
            if not isinstance(turn, Turn):
                raise EnvironmentFailure(f"{self._name} ended before it asked for a completion")
            self._talk = Conversation(self._chat, turn.messages, turn.tools)
            self._turn, self._sent = turn, turn.messages
        return self._talk.prompt()

    def step(self, completion: Completion) -> StepResult:
        assert self._turn is not None
        assert self._talk is not None
        self._turn.reply.get_loop().call_soon_threadsafe(self._turn.reply.set_result, completion)
        event = self._next()
        if not isinstance(event, Turn):
            metrics = {name.lower(): float(value) for name, value in (event["metrics"] or {}).items()}
            return StepResult(reward=float(event["reward"]), done=True, metrics=metrics)
        num_kept = len(self._sent)
        added = event.messages[num_kept + 1 :]
        if event.messages[:num_kept] != self._sent or not added or any(m["role"] == "assistant" for m in added):
            raise EnvironmentFailure(
                f"{self._name} changed the conversation instead of adding to it; such environments are not supported"
            )
        self._talk.answer(completion, added)
        self._turn, self._sent = event, event.messages
        return StepResult(reward=0.0, done=False)

    def _next(self) -> Turn | dict[str, Any]:
        event = self._events.get()  # the caller limits the time
        if isinstance(event, Exception):
            raise EnvironmentFailure(f"{self._name} raised {event!r}") from event
        return event

    async def _run(self) -> None:
        """The whole rollout, on the event loop."""
        try:
            state = await self._environment.rollout(dict(self._row), _client(self), "policy", {})
            if state.get("error") is not None:
                raise state["error"]
            await self._environment.rubric.score_rollout(state)
            await self._environment.rubric.cleanup(state)
            self._events.put({"reward": state["reward"], "metrics": state["metrics"]})
        except Exception as error:  # noqa: BLE001 - raised to whoever waits for the next event
            self._events.put(error)

    async def ask(self, messages: Sequence[Message], tools: Tools | None) -> Completion:
        """What the client of the rollout calls for each completion, on the event loop."""
        turn = Turn(messages=tuple(messages), tools=tools, reply=asyncio.get_running_loop().create_future())
        self._events.put(turn)
        return await turn.reply

    def text(self, completion: Completion) -> str:
        """What the model said."""
        return self._chat.text(completion)


def verifiers(
    chat: Chat,
    *,
    split: str,
    seed: int,
    environment: str,
    args: Mapping[str, Any] | None = None,
) -> VerifiersProblems:
    """The builder of the catalog. ``rollout.max_turns`` must be at least the environment's own limit of turns.

    Args:
        chat: renders the prompts.
        split: ``train`` takes the environment's data set, ``heldout`` its evaluation data set.
        seed: not used; the order is drawn elsewhere.
        environment: the name that ``vf.load_environment`` knows.
        args: of the environment.

    Raises:
        ConfigError: verifiers is missing or of another version, or it cannot load the environment.
    """
    del seed
    _check_version()
    import verifiers as vf

    try:
        loaded = vf.load_environment(environment, **(args or {}))
        rows = loaded.get_dataset() if split == "train" else loaded.get_eval_dataset()
    except Exception as error:
        raise ConfigError(f"environment.args.environment={environment}: verifiers says: {error}") from error
    chat.check_prefix("user")
    if loaded.tool_defs:
        chat.check_prefix("tool")
    return VerifiersProblems(chat, loaded, rows, name=f"{environment}/{split}")


def parse_tool_calls(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What is said beside tool calls, and each call's name and JSON arguments.

    The format is Hermes's, which Qwen's templates ask for: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``;
    a call that is not such JSON stays in the text.
    """
    calls: list[tuple[str, str]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = json.loads(match.group(1))
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError):
            return match.group(0)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match.group(0)
        calls.append((name, json.dumps(arguments)))
        return ""

    return _TOOL_CALL.sub(take, text).strip(), tuple(calls)


def _check_version() -> None:
    try:
        version = importlib.metadata.version("verifiers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            'environment.name=verifiers: the package is not installed; pip install "verifiers==0.1.14"'
        ) from error
    if not version.startswith("0.1."):
        raise ConfigError(
            f'environment.name=verifiers: needs verifiers 0.1, {version} is installed; pip install "verifiers==0.1.14"'
        )


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all rollouts: environments share clients and semaphores that belong to one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop


def _client(environment: VerifiersEnvironment) -> Any:
    """A ``verifiers.Client`` whose model is the engine. Defined here because verifiers is imported only when used."""
    from verifiers import types as vf
    from verifiers.clients.client import Client

    class EngineClient(Client):
        """Passes prompts to the environment's ``ask`` and makes responses of completions."""

        def setup_client(self, config: Any) -> None:
            raise AssertionError("made without a configuration")

        async def to_native_tool(self, tool: Any) -> dict[str, Any]:
            function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
            return {"type": "function", "function": function}

        async def to_native_prompt(self, messages: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            return [_plain(message) for message in messages], {}

        async def get_native_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
        ) -> Completion:
            return await environment.ask(prompt, tools or None)

        async def raise_from_native_response(self, response: Completion) -> None:
            """A completion is always valid."""

        async def from_native_response(self, response: Completion) -> Any:
            content, calls = parse_tool_calls(environment.text(response))
            cut = response.stop_reason == "length"
            message = vf.ResponseMessage(
                content=content,
                tool_calls=[
                    vf.ToolCall(id=f"call_{number}", name=name, arguments=arguments)
                    for number, (name, arguments) in enumerate(calls)
                ]
                or None,
                finish_reason="length" if cut else "tool_calls" if calls else "stop",
                is_truncated=cut,
            )
            return vf.Response(id="engine", created=int(time.time()), model="policy", message=message)

        async def close(self) -> None:
            """Holds nothing."""

    return EngineClient(None)


def _plain(message: Any) -> dict[str, Any]:
    """A verifiers message as chat templates want it."""
    plain: dict[str, Any] = message.model_dump(exclude_none=True)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": json.loads(call["arguments"])},
            }
            for call in plain["tool_calls"]
        ]
    return plain
