"""Chat: prompts, continuations and masks against rendering the conversation whole."""

from __future__ import annotations

import pytest
from tokenizers import normalizers

from framework.data.chat import Chat, Message, check_messages
from framework.errors import DataError
from framework.types import Completion
from tests.fakes import CHATML, tiny_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the thinking of an assistant message is dropped once the user has answered it, not after a tool.
DROPS_THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTS_MESSAGES = "{{ messages | length }}" + CHATML
STOPS_OTHERWISE = CHATML.replace("<|im_end|>", "</s>")

CONVERSATION: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two and two"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and one"},
    {"role": "assistant", "content": "the answer is 5"},
]


def completion(chat: Chat, text: str, *, ended: bool) -> Completion:
    token_ids = chat.tokens(text + (chat.eos_token if ended else ""))
    return Completion(
        token_ids=token_ids,
        sampling_logprobs=(0.0,) * len(token_ids),
        stop_reason="stop" if ended else "length",
        adapter=None,
    )


def test_a_prompt_is_the_rendered_conversation_and_the_opening_of_the_next_turn() -> None:
    chat = Chat(tiny_tokenizer())
    assert chat.decode(chat.prompt(CONVERSATION[:2]).token_ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo and two<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("ended", [True, False])
def test_a_continuation_completes_the_rendered_conversation(ended: bool) -> None:
    chat = Chat(tiny_tokenizer())
    said = completion(chat, "4", ended=ended)
    tokens = (
        *chat.prompt(CONVERSATION[:2]).token_ids,
        *said.token_ids,
        *chat.continuation(said, CONVERSATION[3:4]),
    )
    assert tokens == chat.prompt(CONVERSATION[:4]).token_ids


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_mask_is_true_on_what_the_assistant_said_and_its_end(template: str) -> None:
    chat = Chat(tiny_tokenizer(template))
    tokens = chat.training_tokens(CONVERSATION)
    assert tokens.token_ids == chat.tokens(chat.render(CONVERSATION, add_generation_prompt=False))
    trained = [t if m else -1 for t, m in zip(tokens.token_ids, tokens.loss_mask, strict=True)]
    assert "".join("" if t < 0 else chat.decode([t]) for t in trained) == "4<|im_end|>the answer is 5<|im_end|>"
    assert trained.count(chat.eos_token_id) == 2
    assert tokens.loss_mask[-1] is False  # the line break after the end of the turn is the template's


def test_the_prompt_in_training_is_the_prompt_in_sampling() -> None:
    # "\n\n" is one token, so tokenising whole would merge the template's line break with the answer's.
    chat = Chat(tiny_tokenizer())
    conversation: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]
    tokens = chat.training_tokens(conversation)
    prompt = chat.prompt(conversation[:1]).token_ids
    assert tokens.token_ids[: len(prompt)] == prompt
    assert tokens.loss_mask.index(True) == len(prompt)
    assert tokens.token_ids != chat.tokens(chat.render(conversation, add_generation_prompt=False))


def test_tool_messages_are_not_trained_on() -> None:
    chat = Chat(tiny_tokenizer())
    conversation: list[Message] = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "add(2, 2)"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4"},
    ]
    tokens = chat.training_tokens(conversation)
    trained = [token for token, mask in zip(tokens.token_ids, tokens.loss_mask, strict=True) if mask]
    assert chat.decode(trained) == "add(2, 2)<|im_end|>It is 4<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_good_templates_pass_the_start_up_checks(template: str) -> None:
    chat = Chat(tiny_tokenizer(template))
    chat.check_prefix("user")
    chat.check_prefix("tool")
    chat.check_training()
    assert chat.eos_token_id == 1


def test_a_tokenizer_that_adds_a_space_to_every_text_is_refused() -> None:
    # As those of Llama 2 do: "a" is " a" when tokenised alone.
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    chat = Chat(tokenizer)
    with pytest.raises(DataError, match="another text one by one"):
        chat.check_prefix()
    with pytest.raises(DataError, match="another text one by one"):
        chat.check_training()


def test_a_line_break_that_would_merge_is_no_reason_to_refuse() -> None:
    chat = Chat(
        tiny_tokenizer(CHATML.replace("assistant\n", "assistant\n\n").replace("m['role'] }}\n", "m['role'] }}\n\n"))
    )
    chat.check_prefix()
    chat.check_training()
    assert chat.prompt(CONVERSATION[:1]).token_ids[-1] == chat.tokens("\n\n")[0]


def test_tools_that_the_template_does_not_show_are_an_error() -> None:
    chat = Chat(tiny_tokenizer())
    add = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    with pytest.raises(DataError, match="does not show the function 'add'"):
        chat.prompt(CONVERSATION[:2], [add])
    with pytest.raises(DataError, match="does not show the function 'add'"):
        chat.training_tokens([CONVERSATION[1], {"role": "assistant", "content": "", "tool_calls": [add]}])


def test_a_template_that_drops_thinking_is_refused_where_it_does() -> None:
    chat = Chat(tiny_tokenizer(DROPS_THINKING))
    chat.check_prefix("tool")
    with pytest.raises(DataError, match=r"changes the turn .*once 'user' has answered"):
        chat.check_prefix("user")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    chat = Chat(tiny_tokenizer(COUNTS_MESSAGES))
    with pytest.raises(DataError, match="changes the turn"):
        chat.check_prefix()
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template renders what comes before it differently"):
        chat.check_training()


def test_a_template_whose_turns_do_not_end_with_eos_is_refused() -> None:
    chat = Chat(tiny_tokenizer(STOPS_OTHERWISE))
    with pytest.raises(DataError, match="does not end the assistant's turn with the tokenizer's eos_token"):
        chat.check_training()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "not 'hello'"),
        ([{"content": "x"}], r"messages\[0\] must have a 'role'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], r"messages\[1\] must have 'con"),
    ],
)
def test_malformed_messages_are_named(messages: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_messages(messages)


def test_a_conversation_without_an_assistant_or_with_an_end_of_turn_inside_is_refused() -> None:
    chat = Chat(tiny_tokenizer())
    with pytest.raises(DataError, match="no message of the assistant"):
        chat.training_tokens(CONVERSATION[:2])
    with pytest.raises(DataError, match=r"messages\[1\]: its content has the end-of-turn token"):
        chat.training_tokens([CONVERSATION[1], {"role": "assistant", "content": "4<|im_end|>5"}])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        Chat(tokenizer)
