"""What can be set: ServiceConfig, and the environment variables of those who start the service from a script."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from framework.config import RunConfig, to_typed
from framework.config import schema as run_schema
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
    admin_key_variable: str = "TANDEM_ADMIN_KEY"
    """Environment variable with the first admin's key, where ``auth`` is ``keys``."""
    trainer_adapters: int = 8
    """Adapters kept in the trainer; the least recently used leave to disk and come back exactly."""
    max_in_flight: int = 0
    """Completions in the engine at once, shared evenly by the tenants that sample; 0 is 16 on a CPU, else 64."""
    max_tokens_per_microbatch: int = 0
    """A forward_backward is cut into pieces of this size, between which others run; 0 is 256 on a CPU, else 2048."""
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
    log_level: str = "info"

    def __post_init__(self) -> None:
        least = {"trainer_adapters": 1, "keep_versions": 1, "max_rank": 1}
        for key, low in {**least, "max_in_flight": 0, "max_tokens_per_microbatch": 0}.items():
            if getattr(self, key) < low:
                raise ConfigError(f"service.{key}={getattr(self, key)}: must be at least {low}")
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


def schema() -> dict[str, Any]:
    """The run's schema and the section ``service``: the bottom layer of Hydra's composition."""
    return {**run_schema(), "service": asdict(ServiceConfig())}


def split(composed: Any) -> tuple[RunConfig, ServiceConfig]:
    """Hydra's result, as plain containers, in its two parts.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    values = dict(composed)
    section = values.pop("service")
    defaults = asdict(ServiceConfig())
    for key, value in section.items():
        if key not in defaults:
            raise ConfigError(f"unknown key 'service.{key}'; known are {sorted(defaults)}")
        kind = type(defaults[key]) if defaults[key] is not None else str
        if kind is float and isinstance(value, int):
            section[key] = float(value)
        elif not (value is None and defaults[key] is None) and type(value) is not kind:
            raise ConfigError(f"service.{key}={value!r}: must be of type {kind.__name__}")
    return to_typed(values), ServiceConfig(**section)


def overrides_from_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Config overrides for the environment variables that are set; docs/service.md has the table.

    Raises:
        ConfigError: a value that is not of its variable's kind, or that the service cannot work with.
    """
    overrides: dict[str, Any] = {}
    for name, convert in _VARIABLES.items():
        if env.get(name):
            try:
                overrides.update(convert(env[name]))
            except ValueError as error:
                raise ConfigError(f"environment variable {name}={env[name]!r}: {error}") from error
    return overrides


def arguments_from_env(env: Mapping[str, str]) -> list[str]:
    """Likewise, as arguments for Hydra."""
    return [f"{key}={'null' if value is None else value}" for key, value in overrides_from_env(env).items()]


def _flag(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError("must be true or false")
    return values[text.lower()]


def _enable_lora(text: str) -> dict[str, Any]:
    if not _flag(text):
        raise ValueError("the service serves adapters; for the base model alone use vLLM's own server")
    return {}


_VARIABLES: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "USE_VLLM": lambda text: {"engine.backend": "vllm" if _flag(text) else "trainer"},
    "USE_MEGATRON": lambda text: {"trainer.backend": "megatron" if _flag(text) else "hf"},
    "VLLM_MODEL": lambda text: {"model.name_or_path": text},
    "VLLM_TENSOR_PARALLEL_SIZE": lambda text: {"parallel.tensor_parallel_size": int(text)},
    # a share of the memory is one way to size the KV cache, a number of GiB is the other
    "VLLM_GPU_MEMORY_UTIL": lambda text: {"engine.gpu_memory_utilization": float(text), "engine.kv_cache_gib": None},
    "VLLM_ENABLE_LORA": _enable_lora,
    "VLLM_MAX_LORAS": lambda text: {"engine.max_adapters": int(text)},
    "VLLM_MAX_LORA_RANK": lambda text: {"service.max_rank": int(text)},
    "VLLM_DTYPE": lambda text: {} if text == "auto" else {"model.dtype": text},
}
