"""The client's side of service_latency.py: calls the service and writes how long each call took."""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import tinker
from tinker import types

from framework.client import Client, ServiceError

RNG = random.Random(0)
ONE_TOKEN = {"max_tokens": 1}
ROWS = [{"prompt": "What is the secret word?", "completion": " marzipan."}]


def prompt(length: int = 16) -> list[int]:
    """Tokens that were not sent before, so that no cached prefix helps."""
    return [RNG.randrange(300, 5000) for _ in range(length)]


def timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def repeated(call: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of ``count`` calls, after three that are not counted."""
    for _ in range(3):
        call()
    return [timed(call) for _ in range(count)]


def one_token(url: str, client: Client, service: Any, count: int) -> dict[str, list[float]]:
    """One token of the base model, by each way in."""
    chat = openai.OpenAI(base_url=f"{url}/v1", api_key="tml-local")
    sampler = service.create_sampling_client(base_model=base_model(url)).result()
    params = types.SamplingParams(max_tokens=1)
    return {
        "simple": repeated(lambda: client.sample([prompt()], sampling_params=ONE_TOKEN), count),
        "openai": repeated(lambda: chat.completions.create(model="base", prompt=prompt(), max_tokens=1), count),
        "tinker": repeated(
            lambda: sampler.sample(
                types.ModelInput.from_ints(prompt()), num_samples=1, sampling_params=params
            ).result(),
            count,
        ),
    }


def base_model(url: str) -> str:
    """Its name at the service."""
    name: str = httpx.get(f"{url}/api/v1/get_server_capabilities").json()["supported_models"][0]["model_name"]
    return name


def new_adapter(client: Client, count: int) -> list[float]:
    """From the call that makes an adapter to its first token; each is removed after."""

    def make() -> str:
        model_id: str = client.add_lora(rank=16)["model_id"]
        client.sample([prompt()], model_id=model_id, sampling_params=ONE_TOKEN)
        return model_id

    times = []
    for number in range(count + 3):
        start = time.perf_counter()
        model_id = make()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - start))
        client.remove(model_id)
    return times


def new_step(client: Client, service: Any, url: str, count: int) -> dict[str, Any]:
    """When the first token of each new version arrived: of the simple client, and of the SDK."""
    model_id = client.add_lora(rank=16)["model_id"]
    arrivals = []
    for _ in range(count):
        client.forward_backward(model_id, ROWS)
        client.optim_step(model_id, learning_rate=1e-4)
        client.sample([prompt()], model_id=model_id, sampling_params=ONE_TOKEN)
        arrivals.append(time.monotonic())
    client.remove(model_id)
    training = service.create_lora_training_client(base_model=base_model(url), rank=16).result()
    tokens = prompt()
    inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    params, through_sdk = types.SamplingParams(max_tokens=1), []
    for _ in range(count):
        training.forward_backward([datum], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-4))
        sampler = training.save_weights_and_get_sampling_client().result()
        sampler.sample(types.ModelInput.from_ints(prompt()), num_samples=1, sampling_params=params).result()
        through_sdk.append(time.monotonic())
    return {
        "simple": {"model_id": model_id, "arrivals": arrivals},
        "tinker": {"model_id": training.model_id, "arrivals": through_sdk},
    }


def during(flood: Callable[[Client], object], url: str, threads: int, measure: Callable[[], list[float]]) -> Any:
    """What ``measure`` gives while ``threads`` repeat ``flood``; and how often they got through it."""
    stop, done = threading.Event(), [0]

    def repeat() -> None:
        with Client(url) as client:
            while not stop.is_set():
                flood(client)
                done[0] += 1

    workers = [threading.Thread(target=repeat) for _ in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(3.0)
    result = measure()
    stop.set()
    for worker in workers:
        worker.join()
    return result, done[0]


def fairness(url: str, seconds: float) -> dict[str, dict[str, Any]]:
    """A tenant's latencies alone, beside a flood of samples, and beside a flood of batches; the flood is one tenant."""
    with Client(url) as client:
        mine, theirs = (client.add_lora(rank=16)["model_id"] for _ in range(2))
        batch = [{"prompt": "word " * 20, "completion": "answer " * 20}] * 16
        params = {"max_tokens": 16}

        def sample() -> None:
            client.sample([prompt()], model_id=mine, sampling_params=params)

        def step() -> None:
            client.forward_backward(mine, ROWS)
            client.optim_step(mine, learning_rate=1e-5)

        def flood_samples(other: Client) -> None:
            other.sample([prompt()], model_id=theirs, num_samples=8, sampling_params={"max_tokens": 64})

        def flood_batches(other: Client) -> None:
            other.forward_backward(theirs, batch)

        def measured(call: Callable[[], None]) -> list[float]:
            end, times = time.monotonic() + seconds, list[float]()
            while time.monotonic() < end:
                times.append(timed(call))
            return times

        seen: dict[str, dict[str, Any]] = {}
        for kind, call in (("sample", sample), ("step", step)):
            call()
            record: dict[str, Any] = {"alone": measured(call)}
            for name, flood in (("sampling", flood_samples), ("training", flood_batches)):
                record[name], record[f"{name}_done"] = during(flood, url, 8, lambda call=call: measured(call))  # type: ignore[misc]
            seen[kind] = record
        return seen


def main() -> None:
    """Waits for the service, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("result", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--fairness-s", type=float, required=True)
    arguments = parser.parse_args()
    client = Client(arguments.url)
    client.list_lora_adapters()  # repeated until the service is there
    with tinker.ServiceClient(base_url=arguments.url, api_key="tml-local") as service:
        seen = {
            "one_token_ms": one_token(arguments.url, client, service, arguments.count),
            "new_adapter_ms": new_adapter(client, arguments.count // 2),
            "new_step": new_step(client, service, arguments.url, arguments.count // 2),
        }
    try:
        seen["fairness_ms"] = fairness(arguments.url, arguments.fairness_s)
    except ServiceError as error:
        raise SystemExit(f"the service refused: {error}") from error
    arguments.result.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
