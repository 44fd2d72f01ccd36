"""The simple client against the whole service on the toy backend."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from framework.client import Client, ServiceError
from framework.errors import AdapterError
from framework.lora.peft_io import load_peft
from framework.service.settings import ServiceConfig
from tests.service.server import Running, config, running, start

__all__ = ["config", "running"]


@pytest.fixture
def client(running: Running) -> Client:
    return Client(running.url, retry_s=1.0)


def teach(client: Client, model_id: str, prompt: str, completion: str, steps: int = 40) -> float:
    loss = 0.0
    for _ in range(steps):
        loss = client.forward_backward(model_id, [{"prompt": prompt, "completion": completion}])["loss"]
        client.optim_step(model_id, learning_rate=0.05)
    return loss


def answer(client: Client, model_id: str, prompt: str, length: int) -> str:
    params = {"max_tokens": length, "temperature": 0.0}
    return str(client.sample([prompt], model_id=model_id, sampling_params=params)["completions"][0][0]["text"])


def test_an_adapter_is_the_base_model_when_new_and_the_answer_when_trained(client: Client) -> None:
    model_id = client.add_lora(base_model="base", rank=16, alpha=32)["model_id"]
    assert model_id.startswith("base_lora_")
    assert answer(client, model_id, "ab", 6) == answer(client, "base", "ab", 6)
    assert teach(client, model_id, "ab", "secret") < 2.0
    assert answer(client, model_id, "ab", 2) == "se"


def test_every_step_is_a_peft_folder_that_can_be_registered(running: Running, client: Client) -> None:
    model_id = client.add_lora(rank=4, alpha=8)["model_id"]
    [listed] = client.list_lora_adapters()
    assert (listed["model_id"], listed["rank"], listed["alpha"], listed["version"]) == (model_id, 4, 8.0, 0)
    teach(client, model_id, "ab", "cd", steps=3)
    other = client.register_lora_adapter(adapter_id="copy", lora_path=model_id)["model_id"]  # waits for the folder
    assert other == "copy"
    folder = Path(next(a["lora_path"] for a in client.list_lora_adapters() if a["model_id"] == model_id))
    spec, tensors = load_peft(folder)
    assert (spec.rank, spec.alpha) == (4, 8.0)
    exported = running.backend.trainer.export_adapter(model_id)
    assert all((tensors[name] == exported[name]).all() for name in exported)
    assert answer(client, "copy", "ab", 5) == answer(client, model_id, "ab", 5)


def test_the_folder_follows_by_itself(running: Running, client: Client) -> None:
    model_id = client.add_lora(rank=4)["model_id"]
    teach(client, model_id, "ab", "cd", steps=3)
    exported = running.backend.trainer.export_adapter(model_id)
    folder = running.service.adapters.paths.peft(model_id)
    deadline = time.monotonic() + 10.0
    while True:
        try:
            _, tensors = load_peft(folder)
        except AdapterError:  # not yet there
            tensors = {}
        if tensors and all((tensors[name] == exported[name]).all() for name in exported):
            break
        assert time.monotonic() < deadline, "the folder is not the newest state"
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["/etc", "../..", "nothing", "../../../../etc"])
def test_paths_outside_the_data_directory_are_refused(client: Client, path: str) -> None:
    with pytest.raises(ServiceError, match="is not a folder below") as caught:
        client.register_lora_adapter(adapter_id="evil", lora_path=path)
    assert caught.value.status == 400


def test_a_removed_adapter_is_gone_and_its_name_is_not_found(client: Client) -> None:
    model_id = client.add_lora(rank=2)["model_id"]
    folder = Path(client.list_lora_adapters()[0]["lora_path"])
    client.remove(model_id)
    assert client.list_lora_adapters() == []
    assert not folder.exists()
    with pytest.raises(ServiceError, match="no model") as caught:
        client.sample(["a"], model_id=model_id)
    assert caught.value.status == 404


def test_more_adapters_than_places_all_learn_their_own_answer(config: ServiceConfig) -> None:
    config.trainer_adapters = 2
    server = start(config)
    with Client(server.url) as client:
        words = ["qrs", "tuv", "wxy", "zmn", "cde", "fgh"]
        models = [client.add_lora(rank=rank, alpha=16)["model_id"] for rank in (1, 4, 16, 2, 8, 3)]
        for _ in range(8):  # in turns, so that every turn moves somebody out, in the middle of accumulating
            for model_id, word in zip(models, words, strict=True):
                client.forward_backward(model_id, [{"prompt": "a", "completion": word}])
            for model_id, word in zip(models, words, strict=True):
                client.forward_backward(model_id, [{"prompt": "a", "completion": word}])
                client.optim_step(model_id, learning_rate=0.3)
        assert [answer(client, model_id, "a", 3) for model_id in models] == words
        assert len(server.backend.trainer.adapters()) == 2
    server.stop()


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9 cannot be reached"):
        Client("http://127.0.0.1:9", retry_s=0.1).list_lora_adapters()


def test_a_bad_batch_names_the_datum(client: Client) -> None:
    model_id = client.add_lora(rank=2)["model_id"]
    with pytest.raises(ServiceError, match="datum 1"):
        client.forward_backward(
            model_id, [{"input_ids": [1], "target_tokens": [2]}, {"input_ids": [1], "target_tokens": [99999]}]
        )
    with pytest.raises(ServiceError, match="prompt and completion, or"):
        client.forward_backward(model_id, [{"prompt": "x"}])
