"""Device: the one file that knows what kind of machine this is. What differs between kinds is carried as values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from framework.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
HOST = torch.device("cpu")
"""Where checkpoints and the ranks' conversations live, whatever the accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Built once per process by :func:`open_device` and passed along."""

    kind: str
    """``cpu`` or ``cuda``; only for messages and for backends that must be told."""
    torch_device: torch.device
    collective_backend: str
    """For ``torch.distributed.init_process_group``; collectives on host tensors always work."""
    synchronize: Callable[[], None]
    """Waits until the device has finished what was queued."""
    memory_allocated: Callable[[], int]
    """Bytes of device memory this process's tensors take now; 0 where it is the host's memory."""
    peak_memory_allocated: Callable[[], int]
    """Highest :attr:`memory_allocated` since :attr:`reset_peak_memory`."""
    reset_peak_memory: Callable[[], None]
    memory_free: Callable[[], int]
    """Bytes of device memory that nobody has taken, other processes included; 0 where it is the host's memory."""
    memory_total: Callable[[], int]
    """Bytes of device memory there are; 0 where it is the host's memory."""
    release_cached: Callable[[], None]
    """Gives back what torch keeps of freed tensors, so that :attr:`memory_free` counts it."""
    varlen_attention: bool
    """Whether torch has a variable-length attention kernel for it."""
    compiles_kernels: bool
    """Whether Triton compiles for it."""
    captures_graphs: bool
    """Whether the engine captures its decode steps as graphs where nothing else is configured."""
    kv_cache_bytes: int | None
    """Size of the engine's KV cache where nothing else is configured; None takes what the trainer leaves."""
    kv_block_tokens: int | None
    """Tokens of a block of the engine's KV cache, the grain in which prompts share it; None is the engine's."""
    quantum_tokens: int
    """Tokens of a training microbatch, of a model of its size, that others can wait for: some tenths of a second."""
    quantum_sequences: int
    """Completions an engine step can work on before it takes several times as long as one alone."""
    host_threads: int | None
    """Threads of torch's operators on the host once a run has begun; None is torch's choice."""
    has_invariant_attention: bool
    """Whether the engine's attention kernel can be told to sum alike in every batch: FlashAttention 3, of Hopper."""
    shares_weights: bool
    """Whether the engine keeps weights in the plain layout, so that the trainer can alias them."""


def open_device(kind: str, *, local_rank: int) -> Device:
    """The device of this rank.

    Args:
        kind: ``auto`` (an accelerator if there is one), ``cpu`` or ``cuda``.
        local_rank: of torchrun; picks the accelerator.

    Raises:
        ConfigError: an accelerator was asked for and there is none, or fewer than ranks.
    """
    if kind not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"hardware.device={kind!r}: must be 'auto', 'cpu' or 'cuda'")
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise ConfigError("hardware.device=cuda, but torch finds no CUDA device; use hardware=cpu")
    if kind == "cpu" or not available:
        return _cpu()
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank} has no GPU: there are {count}; lower torchrun's --nproc_per_node")
    return _cuda(local_rank)


def _cpu() -> Device:
    _keep_freed_memory()
    return Device(
        kind="cpu",
        torch_device=torch.device("cpu"),
        collective_backend="gloo",
        synchronize=lambda: None,
        memory_allocated=lambda: 0,
        peak_memory_allocated=lambda: 0,
        reset_peak_memory=lambda: None,
        memory_free=lambda: 0,
        memory_total=lambda: 0,
        release_cached=lambda: None,
        varlen_attention=False,
        compiles_kernels=False,
        captures_graphs=False,
        kv_cache_bytes=2**29,
        kv_block_tokens=32,  # the smallest CPU kernels take; vLLM's 128 is beyond most prompts, and none would share
        quantum_tokens=256,
        quantum_sequences=16,
        host_threads=None,
        has_invariant_attention=False,
        shares_weights=False,
    )


def _keep_freed_memory() -> None:
    """Lets glibc's malloc keep what tensors give back: from the kernel, every page would come with a fault again."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that glibc takes
    libc.mallopt(trim_threshold, 2**31 - 1)


def _cuda(local_rank: int) -> Device:
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Device(
        kind="cuda",
        torch_device=device,
        collective_backend="cpu:gloo,cuda:nccl",
        synchronize=lambda: torch.cuda.synchronize(device),
        memory_allocated=lambda: torch.cuda.memory_allocated(device),
        peak_memory_allocated=lambda: torch.cuda.max_memory_allocated(device),
        reset_peak_memory=lambda: torch.cuda.reset_peak_memory_stats(device),
        memory_free=lambda: torch.cuda.mem_get_info(device)[0],
        memory_total=lambda: torch.cuda.mem_get_info(device)[1],
        release_cached=torch.cuda.empty_cache,
        varlen_attention=True,
        compiles_kernels=True,
        captures_graphs=True,
        kv_cache_bytes=None,
        kv_block_tokens=None,
        quantum_tokens=2048,
        quantum_sequences=64,
        host_threads=1,  # beside a GPU the host has small tensors: where cores are short, threads wait for one another
        has_invariant_attention=torch.cuda.get_device_capability(device)[0] == 9,
        shares_weights=True,
    )
