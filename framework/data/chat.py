"""Chat: the one place where messages become tokens and completions become text.

A thin layer over a Hugging Face tokenizer's chat template. It renders a conversation's start; what the model then
generated is kept as it is (see :mod:`framework.environments.base`) and never rendered or tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from framework.errors import DataError
from framework.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, object]
"""``role``, ``content`` and what the template knows besides, e.g. ``tool_calls``."""


class Chat:
    """A tokenizer with a chat template.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use a chat model, "
                "or put a chat_template.jinja into the model's folder"
            )
        self._tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The tokens of ``messages`` followed by the template's opening of the assistant's turn."""
        return Prompt(token_ids=self.tokens(self.render(messages, add_generation_prompt=True)))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text, special tokens spelled out."""
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        text = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
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
