"""Checkpoints, runs and sessions through the tinker SDK's RestClient, against the whole service on the toy backend."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from tests.service.server import Running

os.environ.setdefault("TINKER_TELEMETRY", "0")
tinker = importlib.import_module("tinker")  # after the environment, which it reads at import
types = tinker.types
KEY = "tml-a-test-key"


@pytest.fixture
def sdk(running: Running) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=running.url, api_key=KEY) as client:
        yield client


@pytest.fixture
def rest(running: Running) -> Any:
    return tinker.RestClient(base_url=running.url, api_key=KEY)


def train(sdk: Any, **options: object) -> Any:
    client = sdk.create_lora_training_client(base_model="toy/bigram", **{"rank": 8, "seed": 1, **options}).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([65, 66, 67]), loss_fn_inputs={"target_tokens": [66, 67, 68]}
    )
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.1)).result()
    return client


def test_capabilities_runs_sessions_and_samplers_are_described(sdk: Any, rest: Any) -> None:
    [model] = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.trainable, model.sampleable) == ("toy/bigram", True, True)
    client = train(sdk, user_metadata={"purpose": "test"})
    run = rest.get_training_run(client.model_id).result()
    assert (run.base_model, run.lora_rank, run.is_lora, run.corrupted) == ("toy/bigram", 8, True, False)
    assert run.user_metadata == {"purpose": "test"}
    assert [r.training_run_id for r in rest.list_training_runs().result().training_runs] == [client.model_id]
    session_id = client.model_id.partition(":")[0]
    assert rest.list_sessions().result().sessions == [session_id]
    sampler = client.save_weights_and_get_sampling_client().result()
    sampler.compute_logprobs(types.ModelInput.from_ints([65, 66])).result()
    session = rest.get_session(session_id).result()
    assert list(session.training_run_ids) == [client.model_id]
    [sampler_id] = session.sampler_ids
    assert rest.get_sampler(sampler_id).result().base_model == "toy/bigram"


def test_checkpoints_are_listed_described_published_and_deleted(sdk: Any, rest: Any) -> None:
    client = train(sdk)
    state = client.save_state("one").result().path
    sampler = client.save_weights_for_sampler("two").result().path
    listed = {c.tinker_path: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert {path: c.checkpoint_type for path, c in listed.items()} == {state: "training", sampler: "sampler"}
    assert all(c.size_bytes > 1000 and not c.public for c in listed.values())
    assert {c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints} == {state, sampler}
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.lora_rank, info.train_attn, info.train_mlp) == ("toy/bigram", 8, True, True)
    rest.publish_checkpoint_from_tinker_path(state).result()
    assert [
        c.public for c in rest.list_checkpoints(client.model_id).result().checkpoints if c.tinker_path == state
    ] == [True]
    rest.unpublish_checkpoint_from_tinker_path(state).result()
    rest.set_checkpoint_ttl_from_tinker_path(state, 7200).result()
    [changed] = [c for c in rest.list_user_checkpoints().result().checkpoints if c.tinker_path == state]
    assert not changed.public
    assert changed.expires_at is not None
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints] == [sampler]
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        rest.delete_checkpoint_from_tinker_path(state).result()
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        sdk.create_training_client_from_state(state).result()
    from_two = sdk.create_sampling_client(model_path=sampler).result()
    assert len(from_two.compute_logprobs(types.ModelInput.from_ints([65, 66])).result()) == 2


def test_an_adapter_is_downloaded_as_a_peft_folder(running: Running, sdk: Any, rest: Any) -> None:
    client = train(sdk)
    path = client.save_weights_external("mine").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    assert path.endswith("/external_weights/mine")
    assert sorted(urls) == ["adapter_config.json", "adapter_model.safetensors"]
    files = {name: httpx.get(url).raise_for_status().content for name, url in urls.items()}  # the link is the key
    exported = running.backend.trainer.export_adapter(client.model_id)
    tensors = load(files["adapter_model.safetensors"])
    assert len(tensors) == len(exported)
    for name, value in exported.items():
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}"], value)
    forged = urls["adapter_config.json"][:-1] + ("0" if urls["adapter_config.json"][-1] != "0" else "1")
    assert httpx.get(forged).status_code in (401, 403, 404)
