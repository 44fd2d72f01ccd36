"""Chat: the one place where messages become tokens and completions become text.

A layer over a Hugging Face tokenizer's chat template, whatever the template. Three users: environments render a
conversation's start and append to it; supervised data is rendered whole, with a mask that is True on what the
assistant said; rewards and tables get text. What a model generated is never rendered or tokenised again.

Both kinds of tokens are laid out from the same cuts of the template's text, before and after each assistant message,
and each piece is tokenised alone, because that is what the engine sees: a prompt, then what was generated.
:meth:`Chat.check_prefix` proves at the start of a run that this gives the template's conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from framework.errors import DataError
from framework.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, object]
"""``role``, ``content`` and what the template knows besides, e.g. ``tool_calls``."""

Tools = Sequence[Mapping[str, object]]
"""JSON schemas of the functions that the assistant may call, as the template wants them."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTokens:
    """A whole conversation; both tuples have one entry per token."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True on the assistant's tokens, the one that ends its turn included."""


class Chat:
    """A tokenizer with a chat template.

    Raises:
        DataError: the tokenizer has no chat template, or no token that ends a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use a chat model, "
                "or put a chat_template.jinja into the model's folder"
            )
        if tokenizer.eos_token is None:
            raise DataError(f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token to end a turn with")
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        self.eos_token: str = tokenizer.eos_token
        self.eos_token_id: int = tokenizer.eos_token_id

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        """The tokens of ``messages`` followed by the template's opening of the assistant's turn.

        Raises:
            DataError: a message without role or content, or one that the template refuses.
        """
        return Prompt(token_ids=self.tokens(self.render(messages, tools, add_generation_prompt=True)))

    def continuation(self, completion: Completion, messages: Sequence[Message]) -> tuple[int, ...]:
        """What follows a completion when ``messages`` answer it, up to the opening of the assistant's next turn.

        The next prompt is the previous one + ``completion.token_ids`` + this.

        Args:
            messages: of the user or of tools, not of the assistant.
        """
        rest = self._after_assistant(messages, says="b")
        ended = bool(completion.token_ids) and completion.token_ids[-1] == self.eos_token_id
        return self.tokens(rest if ended else self.eos_token + rest)

    def training_tokens(self, messages: Sequence[Message], tools: Tools | None = None) -> TrainingTokens:
        """A conversation to learn from; every message of the assistant is trained on.

        The assistant's part is what the template marks with ``{% generation %}``, or without such marks everything
        from the opening of its turn to the end-of-turn token.

        Raises:
            DataError: a malformed message, none of the assistant, or a template that changes earlier messages.
        """
        check_messages(messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("the conversation has no message of the assistant, so there is nothing to train on")
        if _MARKER.search(self._template):
            return self._marked_tokens(messages, tools)
        text = self.render(messages, tools, add_generation_prompt=False)
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        end = 0
        for start, stop in self._assistant_spans(messages, tools, text):
            for piece, trained in ((text[end:start], False), (text[start:stop], True)):
                tokens = self.tokens(piece)
                token_ids.extend(tokens)
                loss_mask.extend([trained] * len(tokens))
            end = stop
        tail = self.tokens(text[end:])
        return TrainingTokens(token_ids=(*token_ids, *tail), loss_mask=(*loss_mask, *([False] * len(tail))))

    def check_prefix(self, role: Literal["user", "tool"] = "user") -> None:
        """Proves on a short conversation that appending tokens gives what the template makes of it whole.

        Args:
            role: who answers the assistant.

        Raises:
            DataError: the template rewrites earlier turns (e.g. drops their thinking) or does not end a turn with the
                tokenizer's eos_token, or the tokenizer adds to the text of a turn.
        """
        says = "<think>\nc\n</think>\n\nb" if "</think>" in self._template else "b"
        opening: list[Message] = [{"role": "user", "content": "a"}]
        answer: list[Message] = [{"role": role, "content": "d"}]
        whole = self.render([*opening, {"role": "assistant", "content": says}, *answer], add_generation_prompt=True)
        rest = self._after_assistant(answer, says=says)
        prompt = self.prompt(opening).token_ids
        appended = (*prompt, *self.tokens(says + self.eos_token), *self.tokens(rest))
        self._check_pieces(appended, whole)

    def check_training(self) -> None:
        """Proves on a short conversation that its pieces together are the whole.

        Raises:
            DataError: as :meth:`training_tokens`, or the tokenizer adds to the text of a turn.
        """
        conversation: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        pieces = self.training_tokens(conversation).token_ids
        self._check_pieces(pieces, self.render(conversation, add_generation_prompt=False))

    def render(self, messages: Sequence[Message], tools: Tools | None = None, *, add_generation_prompt: bool) -> str:
        """The template's text, special tokens spelled out.

        Raises:
            DataError: a malformed message, one that the template refuses, or tools that it does not show.
        """
        check_messages(messages)
        text = self._apply(messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        lost = [name for name in _function_names(messages, tools) if name not in text]
        if lost:
            raise DataError(f"the chat template does not show the function {lost[0]!r}; use a model that knows tools")
        return text

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of template text; nothing is added before or after it."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, completion: Completion) -> str:
        """What the model said, without special tokens."""
        return self.decode(completion.token_ids, skip_special_tokens=True)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of any tokens, for tables and rewards."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def _after_assistant(self, messages: Sequence[Message], *, says: str) -> str:
        """The template's text between the end of an assistant message ``says`` and the next opening."""
        opening: list[Message] = [{"role": "user", "content": "a"}]
        before = self.render(opening, add_generation_prompt=True) + says + self.eos_token
        spoken: Message = {"role": "assistant", "content": says}
        whole = self.render([*opening, spoken, *messages], add_generation_prompt=True)
        if not whole.startswith(before):
            raise DataError(
                f"the chat template changes the turn {before!r} once {messages[0]['role']!r} has answered: {whole!r}. "
                "A conversation can then not be continued token by token; use a template that keeps earlier turns "
                "as they were and ends each with the tokenizer's eos_token (chat_template.jinja in the model's folder)"
            )
        return whole[len(before) :]

    def _check_pieces(self, pieces: Sequence[int], whole: str) -> None:
        # Tokens may differ where a line break at the end of one piece would merge with the next; the text may not.
        told, meant = self.decode(pieces), self.decode(self.tokens(whole))
        if told != meant:
            raise DataError(
                f"this tokenizer gives the turns of {whole!r} another text one by one ({told!r}) than together; use "
                "one that does not add a space at the beginning of a text"
            )

    def _assistant_spans(self, messages: Sequence[Message], tools: Tools | None, text: str) -> list[tuple[int, int]]:
        """Where in ``text`` each assistant message and its end-of-turn token are, as character offsets."""
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if self.eos_token in str(message.get("content")):
                raise DataError(f"messages[{index}]: its content has the end-of-turn token {self.eos_token!r} in it")
            before = self.render(messages[:index], tools, add_generation_prompt=True)
            if not text.startswith(before):
                raise DataError(
                    f"messages[{index}]: the chat template renders what comes before it differently once it is there, "
                    "so the assistant's tokens cannot be told apart; mark them with {% generation %} in the template"
                )
            end = text.find(self.eos_token, len(before))
            if end < 0:
                raise DataError(
                    f"messages[{index}]: the chat template does not end the assistant's turn with the tokenizer's "
                    f"eos_token {self.eos_token!r}; set eos_token, or mark the turn with {{% generation %}}"
                )
            spans.append((len(before), end + len(self.eos_token)))
        return spans

    def _marked_tokens(self, messages: Sequence[Message], tools: Tools | None) -> TrainingTokens:
        encoded: Any = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return TrainingTokens(
            token_ids=tuple(encoded["input_ids"]),
            loss_mask=tuple(bool(marked) for marked in encoded["assistant_masks"]),
        )

    def _apply(self, messages: Sequence[Message], tools: Tools | None, **options: bool) -> object:
        from jinja2.exceptions import TemplateError

        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        functions: list[Any] | None = None if tools is None else [dict(tool) for tool in tools]
        try:
            return self._tokenizer.apply_chat_template(conversation, tools=functions, **options)
        except (TemplateError, TypeError) as error:  # templates add strings without looking
            roles = [message.get("role") for message in messages]
            raise DataError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error


def check_messages(messages: object) -> None:
    """Refuses what is not a conversation.

    Raises:
        DataError: says which message lacks what.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise DataError(f"messages must be a non-empty list of role and content, not {_short(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{index}] must have a 'role', a string; it is {_short(message)}")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise DataError(
                f"messages[{index}] must have 'content', a string, or 'tool_calls'; it is {_short(message)}"
            )


def _function_names(messages: Sequence[Message], tools: Tools | None) -> list[str]:
    """Names of functions that are offered or called, as far as they are where OpenAI's format has them."""
    calls: list[object] = list(tools or ())
    for message in messages:
        made = message.get("tool_calls")
        calls += made if isinstance(made, list) else []
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    return [name for name in names if isinstance(name, str)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."
