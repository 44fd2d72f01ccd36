"""The real openai client against the service."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.service.server import Running


@pytest.fixture
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="tml-any", max_retries=0)


def trained(running: Running, text: str) -> str:
    model = str(running.call("POST", "/add_lora", {"rank": 8, "seed": 1}).json()["model_id"])
    for _ in range(40):
        running.call("POST", "/forward_backward", {"model_id": model, "data": [{"prompt": "ab", "completion": text}]})
        running.call("POST", "/optim_step", {"model_id": model, "learning_rate": 0.05})
    return model


def test_models_lists_the_base_the_adapter_and_its_versions(running: Running, client: Any) -> None:
    model = trained(running, "cde")
    names = [card.id for card in client.models.list()]
    assert names[0] == "toy/bigram"
    assert model in names
    assert f"{model}@40" in names
    assert client.models.retrieve(f"{model}@40").id == f"{model}@40"


def test_the_newest_version_and_a_pinned_one_answer_differently(running: Running, client: Any) -> None:
    model = trained(running, "cdef")
    newest = client.completions.create(model=model, prompt="ab", max_tokens=4, temperature=0)
    assert newest.choices[0].text == "cdef"
    assert newest.choices[0].finish_reason == "length"
    assert newest.usage is not None
    assert (newest.usage.prompt_tokens, newest.usage.completion_tokens) == (2, 4)
    base = client.completions.create(model="base", prompt="ab", max_tokens=4, temperature=0)
    assert base.choices[0].text != "cdef"
    for _ in range(20):
        running.call("POST", "/forward_backward", {"model_id": model, "data": [{"prompt": "b", "completion": "xyzw"}]})
        running.call("POST", "/optim_step", {"model_id": model, "learning_rate": 0.2})
    assert client.completions.create(model=model, prompt="ab", max_tokens=4, temperature=0).choices[0].text != "cdef"
    pinned = client.completions.create(model=f"{model}@60", prompt="ab", max_tokens=4, temperature=0)
    assert (
        pinned.choices[0].text
        == client.completions.create(model=model, prompt="ab", max_tokens=4, temperature=0).choices[0].text
    )


def test_streamed_text_is_the_text(client: Any) -> None:
    options = {"model": "base", "prompt": "hello", "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.completions.create(**options)
    pieces = ["", ""]
    reasons: list[str | None] = [None, None]
    usage = None
    for event in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        for choice in event.choices:
            pieces[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert pieces == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_chat_streams_and_stops_before_the_stop_string(client: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    free = client.chat.completions.create(model="base", messages=messages, max_tokens=40, seed=9)
    text = free.choices[0].message.content or ""
    assert len(text) > 20
    stop = text[10:12]
    options = {"model": "base", "messages": messages, "max_tokens": 40, "seed": 9, "stop": stop}
    cut = client.chat.completions.create(**options)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    events = list(client.chat.completions.create(**options, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events) == cut.choices[0].message.content


def test_logprobs_of_both_endpoints(client: Any) -> None:
    chat = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3
    assert content[0].top_logprobs[0].logprob == pytest.approx(content[0].logprob)
    text = client.completions.create(model="base", prompt="hi", max_tokens=3, temperature=0, logprobs=2)
    assert len(text.choices[0].logprobs.token_logprobs) == 3


@pytest.mark.parametrize(
    ("change", "status", "complaint"),
    [
        ({"model": "nobody"}, 404, "no model 'nobody'"),
        ({"model": "base@3"}, 404, "no model 'base'"),
        ({"prompt": ""}, 400, "0 tokens"),
        ({"prompt": [99999]}, 400, "must lie in"),
        ({"max_tokens": 100000}, 400, "exceed the context"),
        ({"temperature": -1}, 422, "temperature"),
        ({"presence_penalty": 1}, 422, "presence_penalty"),
    ],
)
def test_what_cannot_be_done_is_said(client: Any, change: dict[str, object], status: int, complaint: str) -> None:
    with pytest.raises(openai.APIStatusError, match=complaint) as caught:
        client.completions.create(**{"model": "base", "prompt": "a", **change})
    assert caught.value.status_code == status
