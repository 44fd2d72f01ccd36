"""Conversation: the tokens of a chat that goes on over several turns, for environments that answer the model.

It keeps what the model saw and said as it was; an answer is appended, nothing is rendered again.
"""

from __future__ import annotations

from collections.abc import Sequence

from framework.data.chat import Chat, Message, Tools
from framework.types import Completion, Prompt


class Conversation:
    """What the model is to continue.

    Example:
        talk = Conversation(chat, [{"role": "user", "content": "2+2?"}])
        talk.prompt()  # -> completion
        talk.answer(completion, [{"role": "user", "content": "Sure?"}])
        talk.prompt()  # starts with the first prompt and the completion, token for token

    Whoever builds environments of several turns calls ``chat.check_prefix`` once, at the start.
    """

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Tools | None = None) -> None:
        self._chat = chat
        self._token_ids = chat.prompt(messages, tools).token_ids

    def prompt(self) -> Prompt:
        """Everything so far and the opening of the assistant's turn."""
        return Prompt(token_ids=self._token_ids)

    def answer(self, completion: Completion, messages: Sequence[Message]) -> None:
        """Appends what the model said and what it gets in reply."""
        appended = self._chat.continuation(completion, messages)
        self._token_ids = (*self._token_ids, *completion.token_ids, *appended)
