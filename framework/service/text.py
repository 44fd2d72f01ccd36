"""Between text and tokens, for the routes that speak text. What the model generated is never re-tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framework.service.ops import RequestError

REPLACEMENT = "\ufffd"
"""What a tokenizer shows for bytes that are not a character yet."""


def prompt_tokens(tokenizer: Any, prompt: Any) -> tuple[int, ...]:
    """A string is tokenised; a list of token ids is taken as it is."""
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return tuple(prompt)
    raise RequestError("a prompt must be a string or a list of token ids")


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Messages by the model's own chat template, with the opening of the answer.

    Raises:
        RequestError: the model has no chat template, or its template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("this model has no chat template; use /v1/completions")
    try:
        tokens = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # jinja's errors and whatever a model's template raises
        raise RequestError(f"the model's chat template refused the messages: {error}") from error
    return tuple(tokens)


@dataclass(slots=True, kw_only=True)
class TextStream:
    """Tokens of one completion to text as they come: whole characters only, and nothing of a stop string."""

    tokenizer: Any
    stop: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    sent: int = 0
    """Characters already given out."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text these tokens make certain."""
        self.tokens.extend(tokens)
        text = self._text()
        held = max((len(stop) for stop in self.stop), default=1) - 1
        if text.endswith(REPLACEMENT):
            held = max(held, 1)
        return self._give(text, len(text) - held)

    def finish(self) -> str:
        """The rest."""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        text: str = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return cut_at_stop(text, self.stop)

    def _give(self, text: str, end: int) -> str:
        if end <= self.sent:
            return ""
        piece, self.sent = text[self.sent : end], end
        return piece


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [index for index in (text.find(s) for s in stop) if index >= 0]
    return text[: min(found)] if found else text
