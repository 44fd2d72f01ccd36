"""The unmodified tinker SDK over HTTP against the whole service."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.service.server import Running
from tests.service.toy import VOCAB

os.environ.setdefault("TINKER_TELEMETRY", "0")
tinker = importlib.import_module("tinker")  # after the environment, which it reads at import
types = tinker.types
TEXT = [ord(c) for c in "hello world, hello world"]
KEY = "tml-a-test-key"


@pytest.fixture
def sdk(running: Running) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=running.url, api_key=KEY) as client:
        yield client


def datum(tokens: list[int] = TEXT, **inputs: object) -> Any:
    inputs.setdefault("target_tokens", tokens[1:])
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def make(sdk: Any, **options: object) -> Any:
    return sdk.create_lora_training_client(base_model="toy/bigram", **{"rank": 8, "seed": 1, **options}).result()


def fit(client: Any, tokens: list[int] = TEXT, steps: int = 30, lr: float = 0.02) -> float:
    loss = 0.0
    for _ in range(steps):
        done = client.forward_backward([datum(tokens)], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=lr)).result()
        loss = done.result().metrics["loss:sum"]
    return loss


def logprobs(client: Any, tokens: list[int] = TEXT) -> npt.NDArray[np.float64]:
    result = client.forward([datum(tokens)], "cross_entropy").result()
    return np.asarray(result.loss_fn_outputs[0]["logprobs"].tolist())


def test_a_trained_adapter_is_sampled_with_the_trainers_logprobs(sdk: Any) -> None:
    client = make(sdk)
    before = logprobs(client).sum()
    fit(client)
    after = logprobs(client)
    assert after.sum() > before + 50
    sampler = client.save_weights_and_get_sampling_client().result()
    measured = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()
    assert measured[0] is None
    np.testing.assert_allclose(measured[1:], after, atol=1e-4)


def test_a_sampling_client_stays_at_its_version(sdk: Any) -> None:
    client = make(sdk)
    prompt = types.ModelInput.from_ints(TEXT)
    old = client.save_weights_and_get_sampling_client().result()
    first = old.compute_logprobs(prompt).result()
    samplers = []
    for _ in range(6):  # more versions than engine slots
        fit(client, steps=3)
        samplers.append((client.save_weights_and_get_sampling_client().result(), logprobs(client)))
    for sampler, expected in reversed(samplers):
        np.testing.assert_allclose(sampler.compute_logprobs(prompt).result()[1:], expected, atol=1e-4)
    assert old.compute_logprobs(prompt).result() == first


def test_forward_adds_no_gradient_and_a_failed_batch_neither(sdk: Any) -> None:
    clean, dirty = make(sdk), make(sdk)
    for client in (clean, dirty):
        client.forward_backward([datum()], "cross_entropy").result()
    logprobs(dirty)
    with pytest.raises(tinker.RequestFailedError, match="missing"):
        dirty.forward_backward([datum()], "ppo").result()
    rare = [-90.0] * (len(TEXT) - 1)
    huge = datum(logprobs=rare, advantages=[3e38] * len(rare))
    with pytest.raises(tinker.RequestFailedError, match="not finite"):
        dirty.forward_backward([huge], "importance_sampling").result()
    for client in (clean, dirty):
        client.optim_step(types.AdamParams(learning_rate=0.1)).result()
    np.testing.assert_array_equal(logprobs(clean), logprobs(dirty))


def test_state_with_optimizer_resumes_exactly_and_without_starts_fresh(sdk: Any) -> None:
    client = make(sdk)
    fit(client, steps=5)
    path = client.save_state("middle").result().path
    exact = sdk.create_training_client_from_state_with_optimizer(path).result()
    fresh = sdk.create_training_client_from_state(path).result()
    np.testing.assert_array_equal(logprobs(exact), logprobs(client))
    np.testing.assert_array_equal(logprobs(fresh), logprobs(client))
    for resumed in (client, exact, fresh):
        fit(resumed, steps=1)
    np.testing.assert_array_equal(logprobs(exact), logprobs(client))
    assert np.abs(logprobs(fresh) - logprobs(client)).max() > 1e-3
    with pytest.raises(tinker.RequestFailedError, match="already exists"):
        client.save_state("middle").result()
    client.save_state("middle", overwrite=True).result()


def test_custom_loss_gives_the_gradient_of_cross_entropy(sdk: Any) -> None:
    theirs, ours = make(sdk), make(sdk)
    theirs.forward_backward_custom([datum()], lambda data, lps: (-sum(lp.sum() for lp in lps), {})).result()
    ours.forward_backward([datum()], "cross_entropy").result()
    for client in (theirs, ours):
        client.optim_step(types.AdamParams(learning_rate=0.1)).result()
    np.testing.assert_allclose(logprobs(theirs), logprobs(ours), atol=1e-6)


def test_soft_targets_dense_and_sparse_give_rows_of_logprobs(sdk: Any) -> None:
    client = make(sdk)
    length = len(TEXT) - 1
    targets = np.stack([np.asarray(TEXT[1:]), np.full(length, 65)], axis=1)
    weights = np.tile(np.asarray([0.75, 0.25], dtype=np.float32), (length, 1))
    result = client.forward_backward([datum(target_tokens=targets, weights=weights)], "cross_entropy").result()
    rows = np.asarray(result.loss_fn_outputs[0]["logprobs"].tolist()).reshape(length, 2)
    np.testing.assert_allclose(rows[:, 0], logprobs(client), atol=1e-6)
    assert result.metrics["loss:sum"] == pytest.approx(-(rows * weights).sum(), rel=1e-5)


def test_samples_are_reproducible_distinct_and_stop(sdk: Any) -> None:
    sampler = sdk.create_sampling_client(base_model="toy/bigram").result()
    prompt = types.ModelInput.from_ints(TEXT[:5])
    params = types.SamplingParams(max_tokens=12, seed=3)
    one, two = (sampler.sample(prompt, num_samples=4, sampling_params=params).result() for _ in range(2))
    assert [s.tokens for s in one.sequences] == [s.tokens for s in two.sequences]
    assert len({tuple(s.tokens) for s in one.sequences}) == 4
    target = one.sequences[0].tokens[4]
    stopped = types.SamplingParams(max_tokens=12, seed=3, stop=[target])
    cut = sampler.sample(prompt, num_samples=1, sampling_params=stopped).result().sequences[0]
    assert cut.stop_reason == "stop"
    assert cut.tokens[-1] == target
    assert cut.tokens == one.sequences[0].tokens[: len(cut.tokens)]


def test_top_logprobs_and_the_last_prompt_logprobs(sdk: Any) -> None:
    sampler = sdk.create_sampling_client(base_model="toy/bigram").result()
    result = sampler.sample(
        types.ModelInput.from_ints(TEXT[:6]),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=3, temperature=0.0),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        prompt_logprobs_last_n=2,
    ).result()
    assert [value is None for value in result.prompt_logprobs] == [True] * 4 + [False] * 2
    assert len(result.topk_prompt_logprobs[5]) == 2
    sequence = result.sequences[0]
    assert sequence.topk_logprobs[0][0][0] == sequence.tokens[0]


@pytest.mark.parametrize(
    ("tokens", "complaint"), [([], "0 tokens"), ([VOCAB], "must lie in"), ([65] * 600, "600 tokens")]
)
def test_a_bad_prompt_fails_its_own_future(sdk: Any, tokens: list[int], complaint: str) -> None:
    sampler = sdk.create_sampling_client(base_model="toy/bigram").result()
    params = types.SamplingParams(max_tokens=2)
    with pytest.raises(tinker.RequestFailedError, match=complaint):
        sampler.sample(types.ModelInput.from_ints(tokens), num_samples=1, sampling_params=params).result()
    assert sampler.sample(types.ModelInput.from_ints([65]), num_samples=1, sampling_params=params).result().sequences
