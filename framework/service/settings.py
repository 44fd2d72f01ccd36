"""What can be set: ServiceConfig, and the environment variables of those who start the service from a script."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from framework.errors import ConfigError


@dataclass(kw_only=True)
class ServiceConfig:
    """Config group ``service``."""

    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: str = "service-data"
    """Registry, snapshots, versions and checkpoints."""
    lora_dir: str | None = None
    """PEFT folders of the simple client's adapters; None is ``lora_adapters`` in ``data_dir``."""
    auth: Literal["local", "keys"] = "local"
    """``local``: no keys, one user, loopback only. ``keys``: every request needs one."""
    trainer_adapters: int = 8
    """Adapters kept in the trainer; the least recently used leave to disk and come back exactly."""
    max_in_flight: int = 64
    """Completions in the engine at once, shared evenly by the tenants that sample."""
    max_tokens_per_microbatch: int = 2048
    """A forward_backward is cut into pieces of this size, between which others run."""
    snapshot_after_s: float = 60.0
    """Seconds of training per adapter that a restart may have to repeat."""
    gap_timeout_s: float = 90.0
    """How long requests wait for a missing earlier number."""
    poll_s: float = 25.0
    """How long a poll for a future is held; the SDK gives up after 45."""
    session_timeout_s: float = 300.0
    """A session without heartbeat for this long is finished."""
    stop_grace_s: float = 20.0
    """What runs may take this long after SIGTERM; the rest is done after the next start."""
    outcome_ttl_s: float = 3600.0
    keep_versions: int = 4
    """Newest versions kept of each adapter, besides those that checkpoints and sampling sessions pin."""
    max_rank: int = 64
    max_body_mib: int = 64
    max_pending_per_tenant: int = 8192
    max_adapters_per_owner: int = 256
    max_requests_per_s: float = 0.0
    """Per owner; 0 is no limit."""

    def __post_init__(self) -> None:
        for key in ("trainer_adapters", "max_in_flight", "max_tokens_per_microbatch", "keep_versions", "max_rank"):
            if getattr(self, key) < 1:
                raise ConfigError(f"service.{key}={getattr(self, key)}: must be at least 1")
        if self.auth not in ("local", "keys"):
            raise ConfigError(f"service.auth={self.auth!r}: must be local or keys")
        if self.auth == "local" and not _is_loopback(self.host):
            raise ConfigError(
                f"service.host={self.host} can be reached from other machines and service.auth=local asks for no "
                f"key; set service.auth=keys or bind to 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def overrides_from_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Config overrides for the environment variables that are set; see docs/service.md for the table.

    Raises:
        ConfigError: a value that is not of its variable's kind.
    """
    overrides: dict[str, Any] = {}
    for name, (key, convert) in _VARIABLES.items():
        if name in env:
            try:
                overrides[key] = convert(env[name])
            except (ValueError, KeyError) as error:
                raise ConfigError(f"environment variable {name}={env[name]!r}: {error}") from error
    return overrides


def _flag(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError("must be true or false")
    return values[text.lower()]


_VARIABLES: dict[str, tuple[str, Any]] = {
    "USE_VLLM": ("engine.backend", lambda text: "vllm" if _flag(text) else "trainer"),
    "USE_MEGATRON": ("trainer.backend", lambda text: "megatron" if _flag(text) else "hf"),
    "VLLM_MODEL": ("model.name_or_path", str),
    "VLLM_TENSOR_PARALLEL_SIZE": ("parallel.tensor_parallel_size", int),
    "VLLM_GPU_MEMORY_UTIL": ("engine.gpu_memory_utilization", float),
    "VLLM_ENABLE_LORA": ("engine.enable_lora", _flag),
    "VLLM_MAX_LORAS": ("engine.max_adapters", int),
    "VLLM_MAX_LORA_RANK": ("engine.max_lora_rank", int),
    "VLLM_DTYPE": ("engine.dtype", str),
}
