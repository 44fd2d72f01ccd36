"""The loop as tenants feel it: fairness, interleaving, taking back half a batch, too few slots."""

from __future__ import annotations

import threading
import time
from statistics import median

import pytest

from framework.client import Client, ServiceError
from framework.service.settings import ServiceConfig
from tests.service.server import start
from tests.service.toy import ToyEngine, ToyTrainer
from tests.service.toy_pair import toy_backend

LONG = [{"prompt": "a", "completion": "bcdefgh"}] * 16


def latency(client: Client, model_id: str, count: int = 15) -> float:
    """Median seconds of a sample of eight tokens."""
    spent = []
    for _ in range(count):
        begin = time.perf_counter()
        client.sample(["ab"], model_id=model_id, sampling_params={"max_tokens": 8, "stop": []})
        spent.append(time.perf_counter() - begin)
    return median(spent)


@pytest.mark.slow  # it measures times, which a busy machine changes
def test_a_flood_leaves_another_tenant_within_three_times(config: ServiceConfig) -> None:
    config.max_tokens_per_microbatch = 8
    config.max_in_flight = 16
    trainer, engine = ToyTrainer(seconds_per_call=0.03), ToyEngine(seconds_per_step=0.01)
    server = start(config, toy_backend(trainer=trainer, engine=engine))
    stop = threading.Event()

    def flood(work: str) -> None:
        with Client(server.url) as client:
            model_id = client.add_lora(rank=4)["model_id"]
            while not stop.is_set():
                if work == "train":
                    client.forward_backward(model_id, LONG)
                else:
                    params = {"max_tokens": 64, "stop": []}
                    client.sample(["a"] * 8, model_id=model_id, num_samples=8, sampling_params=params)

    with Client(server.url) as client:
        mine = client.add_lora(rank=4)["model_id"]
        alone = latency(client, mine)
        floods = [threading.Thread(target=flood, args=(work,)) for work in ("train", "train", "sample")]
        for thread in floods:
            thread.start()
        time.sleep(1.0)
        crowded = latency(client, mine)
        stop.set()
        for thread in floods:
            thread.join()
    server.stop()
    assert crowded < 3 * alone + 0.03, f"{alone:.3f} s alone, {crowded:.3f} s with three floods"


def test_tokens_flow_while_a_long_batch_trains(config: ServiceConfig) -> None:
    config.max_tokens_per_microbatch = 8
    server = start(config, toy_backend(trainer=ToyTrainer(seconds_per_call=0.1)))
    with Client(server.url) as client, Client(server.url) as other:
        model_id = client.add_lora(rank=4)["model_id"]
        batch = threading.Thread(target=client.forward_backward, args=(model_id, LONG))
        begin = time.perf_counter()
        batch.start()
        time.sleep(0.15)
        other.sample(["ab"], sampling_params={"max_tokens": 4, "stop": []})
        sampled = time.perf_counter() - begin
        batch.join()
        trained = time.perf_counter() - begin
    server.stop()
    assert trained > 1.6, "16 microbatches of 0.1 s"
    assert sampled < trained / 2


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_batch_that_fails_half_way_leaves_no_gradient(config: ServiceConfig, accumulated: bool) -> None:
    config.max_tokens_per_microbatch = 8
    results = []
    for fails in (False, True):
        trainer = ToyTrainer()
        config.data_dir += "x"
        server = start(config, toy_backend(trainer=trainer))
        with Client(server.url) as client:
            model_id = client.add_lora(rank=4, seed=1)["model_id"]
            if accumulated:
                client.forward_backward(model_id, LONG[:2])
            if fails:
                trainer.fail_at_call = trainer.calls + 3
                with pytest.raises(ServiceError, match="told to fail") as caught:
                    client.forward_backward(model_id, LONG)
                assert caught.value.status == 500
            client.forward_backward(model_id, LONG[:3])
            client.optim_step(model_id, learning_rate=0.1)
            results.append(client.forward_backward(model_id, LONG)["loss"])
        server.stop()
    assert results[0] == results[1]


def test_more_versions_than_slots_while_all_are_sampled(config: ServiceConfig) -> None:
    engine = ToyEngine(max_adapters=2, seconds_per_step=0.002)
    server = start(config, toy_backend(engine=engine))
    words = ["qrs", "tuv", "wxy", "zmn", "cde"]

    def learn(word: str, answers: dict[str, set[str]]) -> None:
        with Client(server.url) as client:
            model_id = client.add_lora(rank=4)["model_id"]
            for _ in range(12):
                client.forward_backward(model_id, [{"prompt": "a", "completion": word}])
                client.optim_step(model_id, learning_rate=0.3)
            params = {"max_tokens": 3, "temperature": 0.0}
            answers[word] = {
                client.sample(["a"], model_id=model_id, sampling_params=params)["completions"][0][0]["text"]
                for _ in range(10)
            }

    answers: dict[str, set[str]] = {}
    tenants = [threading.Thread(target=learn, args=(word, answers)) for word in words]
    for tenant in tenants:
        tenant.start()
    for tenant in tenants:
        tenant.join()
    server.stop()
    assert answers == {word: {word} for word in words}
    assert len(engine.slots) <= 2
