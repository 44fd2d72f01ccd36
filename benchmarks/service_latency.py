"""What the service costs on top of the engine, how soon an adapter or a step can be sampled, and who waits for whom.

One process serves, as launch/serve.py does; a second one is the client. On an otherwise idle machine:

    .venv/bin/python -m benchmarks.service_latency

    one token     through HTTP (the simple client, OpenAI's completions, the tinker SDK) against the engine called in
                  the serving process, before and after; wanted: 10 ms more at the median
    new adapter   from the call that makes it to its first token; wanted: 100 ms
    new step      from the end of the trainer's optim_step to the first token of the new version at the client, the
                  push, its proof and its files included; wanted: 50 ms
    fairness      a tenant's median latency alone and while another one floods the service; wanted: 3 times

The process that serves notes when ``optim_step`` ended on the clock that both processes share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from framework.config import schema as run_schema
from framework.config import to_typed
from framework.engine.base import SampleRequest, generate
from framework.models.hub import DEFAULT_MODEL
from framework.runtime import versions
from framework.service.launch import Backend, serve
from framework.service.opening import open_backend
from framework.service.settings import ServiceConfig
from framework.trainer.base import OptimResult
from framework.types import AdamParams, Prompt, SamplingParams

PROMPT_TOKENS = 16


class NotedTrainer:
    """A trainer that notes when each optimizer step ended, by adapter."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.ends: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def optim_step(self, name: str, params: AdamParams) -> OptimResult:
        """The trainer's; the result is complete when the clock is read."""
        result: OptimResult = self._trainer.optim_step(name, params)
        self.ends.setdefault(name, []).append(time.monotonic())
        return result


def direct(backend: Backend, count: int) -> list[float]:
    """Milliseconds of one token from the engine, called as the service calls it."""
    times = []
    for number in range(count):
        tokens = tuple(300 + (number * 31 + i * 7) % 5000 for i in range(PROMPT_TOKENS))
        request = SampleRequest(
            request_id=f"direct-{number}",
            prompt=Prompt(token_ids=tokens),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
            adapter=None,
        )
        start = time.perf_counter()
        generate(backend.engine, [request])
        times.append(1e3 * (time.perf_counter() - start))
    return times


def serve_for(config: ServiceConfig, backend: Backend, command: list[str]) -> None:
    """Serves until ``command``, the client, has ended; its failure ends everything."""
    client = subprocess.Popen(command)

    def end() -> None:
        client.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    serve(config, backend)
    if client.returncode:
        sys.exit(f"the client failed with code {client.returncode}")


def open_with(arguments: argparse.Namespace, folder: str) -> tuple[ServiceConfig, Backend, NotedTrainer]:
    """The pair of engines, and how it is served."""
    values = run_schema()
    values["model"]["name_or_path"] = arguments.model
    values["engine"] |= {"max_adapters": 4, "kv_cache_gib": 0.5}
    config = ServiceConfig(port=arguments.port, data_dir=f"{folder}/data", log_level="warning")
    backend = open_backend(to_typed(values), config)
    noted = NotedTrainer(backend.trainer)
    return config, dataclasses.replace(backend, trainer=noted), noted


def verdicts(before: list[float], after: list[float], seen: dict[str, Any], noted: NotedTrainer) -> dict[str, Any]:
    """The figures, each with what is wanted of it."""
    engine = report.median(before + after)
    figures: dict[str, Any] = {"engine_ms": report.spread(before + after)}
    for way, times in seen["one_token_ms"].items():
        figures[f"one_token/{way}"] = {**report.spread(times), "overhead_median": report.median(times) - engine}
    figures["new_adapter_ms"] = {**report.spread(seen["new_adapter_ms"]), "wanted": 100}
    for way, record in seen["new_step"].items():
        ends = noted.ends[record["model_id"]][-len(record["arrivals"]) :]
        times = [1e3 * (arrival - end) for arrival, end in zip(record["arrivals"], ends, strict=True)]
        figures[f"new_step_ms/{way}"] = {**report.spread(times), "wanted": 50}
    for kind, record in seen["fairness_ms"].items():
        alone = report.median(record["alone"])
        for flood in ("sampling", "training"):
            during = report.spread(record[flood])
            figures[f"fairness/{kind}/{flood}"] = {
                "alone_ms": alone, "flooded_ms": during, "times": during["median"] / alone, "wanted": 3,
                "others_done": record[f"{flood}_done"],
            }  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--count", type=int, default=50, help="repetitions of each short measurement")
    parser.add_argument("--fairness-s", type=float, default=15.0, help="length of each flood")
    arguments = parser.parse_args()
    machine = report.machine()
    with tempfile.TemporaryDirectory() as folder:
        config, backend, noted = open_with(arguments, folder)
        result = Path(folder) / "client.json"
        command = [sys.executable, "-m", "benchmarks.service_client", f"http://127.0.0.1:{config.port}", str(result)]
        options = ["--count", str(arguments.count), "--fairness-s", str(arguments.fairness_s)]
        direct(backend, 20)
        before = direct(backend, arguments.count)
        serve_for(config, backend, [*command, *options])
        after = direct(backend, arguments.count)
        figures = verdicts(before, after, json.loads(result.read_text()), noted)
    for name, values in figures.items():
        print(name, json.dumps(values, default=float))
    report.write(
        "service_latency", {"model": arguments.model, "figures": figures}, machine=machine, versions=versions()
    )


if __name__ == "__main__":
    main()
