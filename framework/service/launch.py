"""Puts the service together on a runtime's trainer and engine, and runs it until SIGTERM.

Rank 0 serves HTTP on a thread of its own; the main thread of every rank runs the lockstep loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from framework.engine.base import RolloutEngine, SampleRequest, generate
from framework.errors import ConfigError
from framework.lora.spec import LoraSpec
from framework.runtime import settle
from framework.service.adapters import Adapters, Paths
from framework.service.app import build_app
from framework.service.board import Board, LoopConfig
from framework.service.executor import Executor, Lockstep
from framework.service.futures import Futures
from framework.service.http import Rates
from framework.service.keys import Keys
from framework.service.leader import Leader, Stop
from framework.service.metrics import Metrics
from framework.service.recovery import recover
from framework.service.reports import Reports
from framework.service.requests import RequestLimits
from framework.service.scheduler import Scheduler
from framework.service.service import Model, Service
from framework.service.settings import ServiceConfig
from framework.service.store import Store
from framework.service.wire import ModelLimits
from framework.service.worker import Worker
from framework.service.writer import Writer
from framework.trainer.base import Trainer
from framework.types import Prompt, SamplingParams
from framework.weight_sync import WeightSync

log = logging.getLogger(__name__)
HEARTBEAT_S = 20.0
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end the service in order; torchrun passes a hangup of its terminal on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the service runs on; one per rank."""

    trainer: Trainer
    engine: RolloutEngine
    weight_sync: WeightSync
    mesh: Lockstep
    tp_size: int
    vocab_size: int
    pad_to_multiple_of: int
    max_lora_rank: int
    max_in_flight: int
    """See :class:`ServiceConfig`; here the device's where that has 0."""
    max_tokens_per_microbatch: int
    """Likewise."""
    host_threads: int | None
    """See :attr:`framework.device.Device.host_threads`."""
    memory: Mapping[str, float]
    """How much of it the engine may take, for the log: ``kv_cache_gib`` or ``gpu_memory_utilization``, or nothing."""
    model: Model


def build_service(config: ServiceConfig, backend: Backend) -> tuple[Service, Leader]:
    """Rank 0's half: the registry, the queues and the service, with everything a restart has to bring back."""
    data_dir = Path(config.data_dir).resolve()
    facts = {"model": backend.model.name, "tensor_parallel_size": str(backend.tp_size)}
    store = Store(data_dir / "registry.sqlite3", facts=facts)
    paths = Paths(data_dir=data_dir, lora_dir=Path(config.lora_dir or data_dir / "lora_adapters").resolve())
    adapters = Adapters(store=store, paths=paths)
    loop_config = LoopConfig(
        trainer_slots=config.trainer_adapters,
        engine_slots=backend.engine.max_adapters,
        num_ranks=backend.tp_size,
        snapshot_after_s=config.snapshot_after_s,
        gap_timeout_s=config.gap_timeout_s,
        keep_versions=config.keep_versions,
        session_timeout_s=config.session_timeout_s,
        outcome_ttl_s=config.outcome_ttl_s,
        heartbeat_s=HEARTBEAT_S,
        stop_grace_s=config.stop_grace_s,
    )
    futures, metrics = Futures(store=store), Metrics()
    board = Board(
        config=loop_config,
        store=store,
        adapters=adapters,
        scheduler=Scheduler(max_in_flight=config.max_in_flight or backend.max_in_flight),
        deliver=futures.deliver,
        metrics=metrics,
        stream=futures.stream,
    )
    leader = Leader(board=board, reports=Reports(board=board))
    limits = RequestLimits(
        model=ModelLimits(vocab_size=backend.vocab_size, max_tokens=backend.model.context_tokens),
        max_rank=min(config.max_rank, backend.max_lora_rank),
        tokenizer=backend.model.tokenizer,
    )
    service = Service(
        config=config,
        model=backend.model,
        limits=limits,
        store=store,
        adapters=Adapters(store=store, paths=paths),
        futures=futures,
        keys=Keys(store=store, auth=config.auth),
        rates=Rates(per_s=config.max_requests_per_s),
        metrics=metrics,
        writer=Writer(),
        post=leader.inbox.put,
    )
    _admit_admin(config, service.keys)
    repeated, pending = recover(board, futures, limits)
    log.info("registry opened", extra={"to_repeat": repeated, "pending": pending})
    return service, leader


def _admit_admin(config: ServiceConfig, keys: Keys) -> None:
    """Registers the admin key from the environment; without any key nobody could ever call.

    Raises:
        ConfigError: keys are required and there is neither one in the registry nor one in the environment.
    """
    if config.auth != "keys":
        return
    key = os.environ.get(config.admin_key_variable)
    if key:
        keys.add(key, "admin", admin=True)
    elif not keys.any():
        raise ConfigError(
            f"service.auth=keys and the registry has no key yet: set the environment variable "
            f"{config.admin_key_variable} to an admin's key (it begins with tml-), then POST /admin/keys makes others"
        )


def build_worker(config: ServiceConfig, backend: Backend, writer: Writer) -> Worker:
    """What executes on this rank."""
    return Worker(
        trainer=backend.trainer,
        engine=backend.engine,
        weight_sync=backend.weight_sync,
        tp_rank=backend.mesh.tp_rank,
        writer=writer,
        base_model=backend.model.name,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch or backend.max_tokens_per_microbatch,
        pad_to_multiple_of=backend.pad_to_multiple_of,
    )


def warm_up(backend: Backend) -> None:
    """The engine's first tokens take seconds, of the base model and of an adapter; not while tenants wait."""
    backend.trainer.add_adapter("warm-up", LoraSpec(rank=1), seed=0)
    ref = backend.weight_sync.publish("warm-up")
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    generate(
        backend.engine,
        [
            SampleRequest(request_id=f"warm-up-{i}", prompt=Prompt(token_ids=(1,)), sampling=sampling, adapter=adapter)
            for i, adapter in enumerate((None, ref))
        ],
    )
    backend.engine.unload_adapter(ref)
    backend.trainer.remove_adapter("warm-up")


class HttpThread:
    """Uvicorn on a thread with an event loop of its own."""

    def __init__(self, service: Service) -> None:
        """Binds at once, so that a taken port fails the start.

        Raises:
            ConfigError: the address cannot be bound.
        """
        config = service.config
        self._socket = _bind(config.host, config.port)
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(build_app(service), log_config=None, access_log=False, timeout_graceful_shutdown=5)
        )
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Closes the connections and waits for the thread."""
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


def check_address(host: str, port: int) -> None:
    """Finds out early whether the service could listen.

    Raises:
        ConfigError: the address cannot be bound; names both keys.
    """
    _bind(host, port).close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only then
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"service.host={host}, service.port={port} cannot be bound: {error}") from error
    sock.listen(2048)
    return sock


GIL_SWITCH_S = 0.0005
"""Every tensor operation lets go of the interpreter; the HTTP thread may hold it for so long (Python's own: 5 ms)."""


def serve(config: ServiceConfig, backend: Backend) -> None:
    """Serves until one of :data:`STOPS`. All ranks call it; returns on all of them together."""
    sys.setswitchinterval(GIL_SWITCH_S)
    warm_up(backend)
    settle(host_threads=backend.host_threads)
    if backend.mesh.tp_rank != 0:
        for number in STOPS:  # rank 0 decides when all end
            signal.signal(number, signal.SIG_IGN)
        worker = build_worker(config, backend, Writer())
        Executor(worker=worker, mesh=backend.mesh, planner=None).run()
        worker.writer.flush()
        return
    service, leader = build_service(config, backend)
    worker = build_worker(config, backend, service.writer)
    http = HttpThread(service)

    def stop(number: int, frame: FrameType | None) -> None:
        log.info("stopping", extra={"signal": number})
        service.stopping = True
        leader.inbox.put(Stop())

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job is not to be interrupted
            signal.signal(number, stop)
    http.start()
    log.info("serving", extra={"url": f"http://{config.host}:{http.port}", "data_dir": config.data_dir})
    try:
        Executor(worker=worker, mesh=backend.mesh, planner=leader).run()
        worker.writer.flush()
    finally:
        http.stop()
        service.store.close()
