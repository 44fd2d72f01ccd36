"""Environment variables, the section's types, and who may be reached from where."""

from __future__ import annotations

import pytest

from framework.errors import ConfigError
from framework.service.settings import ServiceConfig, arguments_from_env, overrides_from_env, schema, split


def test_every_variable_is_mapped() -> None:
    env = {
        "USE_VLLM": "false",
        "USE_MEGATRON": "0",
        "VLLM_MODEL": "some/model",
        "VLLM_TENSOR_PARALLEL_SIZE": "2",
        "VLLM_GPU_MEMORY_UTIL": "0.3",
        "VLLM_ENABLE_LORA": "true",
        "VLLM_MAX_LORAS": "6",
        "VLLM_MAX_LORA_RANK": "32",
        "VLLM_DTYPE": "float32",
        "HOME": "/somewhere",
    }
    assert overrides_from_env(env) == {
        "engine.backend": "trainer",
        "trainer.backend": "hf",
        "model.name_or_path": "some/model",
        "parallel.tensor_parallel_size": 2,
        "engine.gpu_memory_utilization": 0.3,
        "engine.kv_cache_gib": None,
        "engine.max_adapters": 6,
        "service.max_rank": 32,
        "model.dtype": "float32",
    }
    assert overrides_from_env({"VLLM_DTYPE": "auto", "VLLM_MODEL": ""}) == {}
    assert arguments_from_env({"VLLM_GPU_MEMORY_UTIL": "0.5"})[1] == "engine.kv_cache_gib=null"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("USE_VLLM", "maybe", "must be true or false"),
        ("VLLM_MAX_LORAS", "many", "invalid literal"),
        ("VLLM_ENABLE_LORA", "false", "serves adapters"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{value}'.*{complaint}"):
        overrides_from_env({name: value})


def test_the_schema_splits_into_run_and_service() -> None:
    run, service = split(schema() | {"service": {**schema()["service"], "port": 9, "poll_s": 3}})
    assert run.model.name_or_path == schema()["model"]["name_or_path"]
    assert (service.port, service.poll_s) == (9, 3.0)
    for wrong, complaint in (({"prot": 9}, "unknown key 'service.prot'"), ({"port": "x"}, "must be of type int")):
        with pytest.raises(ConfigError, match=complaint):
            split(schema() | {"service": {**schema()["service"], **wrong}})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "example.org", "::"])
def test_without_keys_only_loopback_is_allowed(host: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.auth=keys"):
        ServiceConfig(host=host)
    assert ServiceConfig(host=host, auth="keys").host == host


def test_loopback_and_sizes() -> None:
    assert [ServiceConfig(host=host).host for host in ("127.0.0.1", "::1", "localhost")]
    with pytest.raises(ConfigError, match=r"service\.trainer_adapters=0"):
        ServiceConfig(trainer_adapters=0)
    with pytest.raises(ConfigError, match="must be local or keys"):
        ServiceConfig(auth="none")  # type: ignore[arg-type]
