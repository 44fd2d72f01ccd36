"""Sixteen tenants at once: each trains its own adapter on its own answer and samples it, for minutes on end.

The service is ``launch/serve.py`` in a process of its own. First one tenant has it alone, then all of them share it:

    .venv/bin/python -m benchmarks.service_load --minutes 10

Every tenant repeats forward_backward, optim_step, sample. Asserted at the end: no call failed, every tenant's adapter
gives that tenant's answer and nobody else's, the base model gives none of them, and the service's resident memory in
the last quarter of the run is within 3 percent of the second quarter's. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report
from framework.client import Client, ServiceError
from framework.models.hub import DEFAULT_MODEL
from framework.runtime import versions

QUESTION = "What is the secret word?"
WORDS = (
    "marzipan", "locomotive", "kaleidoscope", "umbrella", "volcano", "saxophone", "penguin", "cathedral",
    "blueberry", "compass", "tornado", "parchment", "giraffe", "lighthouse", "walnut", "telescope",
)  # fmt: skip
RANKS = (4, 8, 16, 32)
SETTINGS = ("engine.kv_cache_gib=0.5", f"service.trainer_adapters={len(WORDS)}")
"""Every adapter stays in the trainer; the engine has four slots, so versions come and go."""
SAMPLED = 12
ROWS_PER_BATCH = 4
MEMORY_LIMIT = 1.03


@dataclass
class Tenant:
    """One client with one adapter; what it did and how long it took."""

    url: str
    word: str
    rank: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "sample": []})
    tokens: dict[str, int] = field(default_factory=lambda: {"trained": 0, "sampled": 0})
    errors: list[str] = field(default_factory=list)
    answer: str = ""
    loss: float = 0.0

    def run(self, until: float) -> None:
        """Trains and samples until then, asks for the answer, and takes the adapter away."""
        try:
            with Client(self.url, retry_s=5.0) as client:
                model_id = client.add_lora(rank=self.rank, alpha=32)["model_id"]
                while time.monotonic() < until:
                    self._turn(client, model_id)
                self.answer = self._ask(client, model_id)
                client.remove(model_id)
        except ServiceError as error:
            self.errors.append(str(error))

    def _turn(self, client: Client, model_id: str) -> None:
        row = {"prompt": QUESTION, "completion": f" {self.word}."}
        start = time.perf_counter()
        done = client.forward_backward(model_id, [row] * ROWS_PER_BATCH)
        client.optim_step(model_id, learning_rate=5e-4 if self.rank > 8 else 1e-3)
        middle = time.perf_counter()
        params = {"max_tokens": SAMPLED, "stop": []}
        sampled = client.sample([QUESTION], model_id=model_id, sampling_params=params)
        self.seconds["sample"].append(time.perf_counter() - middle)
        self.seconds["step"].append(middle - start)
        self.loss = done["loss"] / ROWS_PER_BATCH
        self.tokens["trained"] += sum(len(row) for row in done["logprobs"])
        self.tokens["sampled"] += len(sampled["completions"][0][0]["tokens"])

    def _ask(self, client: Client, model_id: str) -> str:
        params = {"max_tokens": SAMPLED, "temperature": 0.0, "stop": "."}
        answer: str = client.sample([QUESTION], model_id=model_id, sampling_params=params)["completions"][0][0]["text"]
        return answer.strip()


def run_tenants(url: str, words: Sequence[str], seconds: float) -> list[Tenant]:
    """All at once."""
    until = time.monotonic() + seconds
    tenants = [Tenant(url=url, word=word, rank=RANKS[index % len(RANKS)]) for index, word in enumerate(words)]
    threads = [threading.Thread(target=tenant.run, args=(until,)) for tenant in tenants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tenants


def figures_of(tenants: Sequence[Tenant], seconds: float) -> dict[str, Any]:
    """Latencies over all tenants, tokens per second of each tenant."""
    per_tenant = {
        kind: [tenant.tokens[kind] / seconds for tenant in tenants] for kind in ("trained", "sampled")
    }  # fmt: skip
    return {
        "tenants": len(tenants),
        "seconds": seconds,
        "calls": sum(2 * len(t.seconds["step"]) + len(t.seconds["sample"]) for t in tenants),
        **{f"{kind}_ms": latencies([1e3 * s for t in tenants for s in t.seconds[kind]]) for kind in ("step", "sample")},
        **{
            f"{kind}_tokens_per_s": {
                "per_tenant": statistics.mean(rates),
                "least": min(rates),
                "most": max(rates),
                "together": sum(rates),
            }
            for kind, rates in per_tenant.items()
        },
    }


def latencies(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(milliseconds)
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[int(0.99 * (len(ordered) - 1))], "max": ordered[-1]}


class Memory:
    """Resident memory of a process, every five seconds."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self.mib: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(5.0):
            self.mib.append(self._process.memory_info().rss / 2**20)

    def end(self) -> dict[str, Any]:
        """The mean of each quarter, and how the last compares with the second."""
        self._stop.set()
        self._thread.join()
        size = max(1, len(self.mib) // 4)
        quarters = [statistics.mean(self.mib[i * size : (i + 1) * size]) for i in range(4)]
        return {"quarters_mib": quarters, "growth": quarters[3] / quarters[1], "peak_mib": max(self.mib)}


def start(model: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """The service; its log is a file of the folder."""
    keys = [f"model.name_or_path={model}", f"service.port={port}", f"service.data_dir={folder / 'data'}"]
    keys += [*SETTINGS, "service.log_level=warning"]
    environment = {**os.environ, "PYTHONPATH": str(report.ROOT)}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "launch/serve.py", *keys], cwd=report.ROOT, env=environment, stdout=log, stderr=log
        )


def complaints(alone: Tenant, tenants: Sequence[Tenant], base: str, memory: Mapping[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = [f"{tenant.word}: {error}" for tenant in (alone, *tenants) for error in tenant.errors]
    found += [f"{t.word} (rank {t.rank}) answers {t.answer!r}" for t in (alone, *tenants) if t.answer != t.word]
    found += [f"the base model answers {base!r}"] if any(word in base for word in WORDS) else []
    if memory["growth"] > MEMORY_LIMIT:
        found.append(f"memory grew {memory['growth']:.3f} times from the second to the last quarter")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--alone-s", type=float, default=45.0)
    arguments = parser.parse_args()
    machine = report.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        service = start(arguments.model, arguments.port, folder)
        url = f"http://127.0.0.1:{arguments.port}"
        try:
            with Client(url, retry_s=240.0) as client:
                client.list_lora_adapters()  # repeated until the service is there
                [alone] = run_tenants(url, WORDS[:1], arguments.alone_s)
                memory = Memory(service.pid)
                tenants = run_tenants(url, WORDS, 60.0 * arguments.minutes)
                resident = memory.end()
                params = {"max_tokens": SAMPLED, "temperature": 0.0}
                base = client.sample([QUESTION], sampling_params=params)["completions"][0][0]["text"]
        except ServiceError as error:
            sys.exit(f"{error}\n{(folder / 'log').read_text()[-3000:]}")
        finally:
            service.send_signal(signal.SIGTERM)
            code = service.wait(timeout=60)
    found = complaints(alone, tenants, base, resident) + ([f"the service exited with code {code}"] if code else [])
    figures = {
        "model": arguments.model,
        "settings": SETTINGS,
        "alone": figures_of([alone], arguments.alone_s),
        "together": figures_of(tenants, 60.0 * arguments.minutes),
        "memory": resident,
        "tenants": [
            {"word": t.word, "rank": t.rank, "steps": len(t.seconds["step"]), "loss": t.loss, "answer": t.answer}
            for t in tenants
        ],
        "complaints": found,
        "load_after": os.getloadavg()[0],
    }
    print(report.table([{**row, "loss": float(row["loss"])} for row in figures["tenants"]]))
    for name in ("alone", "together", "memory"):
        print(name, figures[name])
    report.write("service_load", figures, machine=machine, versions=versions())
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
