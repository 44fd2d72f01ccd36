"""The simple client: an adapter, its gradients, its steps and its samples, over plain JSON. No torch.

>>> client = Client("http://127.0.0.1:8000")
>>> model_id = client.add_lora(base_model="base", rank=16, alpha=32)["model_id"]
>>> client.forward_backward(model_id, [{"prompt": "Who are you?", "completion": " A tandem."}])
>>> client.optim_step(model_id, learning_rate=1e-3)
>>> client.sample(model_id=model_id, prompts=["Who are you?"], sampling_params={"max_tokens": 20})
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from framework.errors import FrameworkError

RETRIED = (429, 502, 503, 504)
"""Answers after which the same request, with the same key, may be sent again."""


class ServiceError(FrameworkError, RuntimeError):
    """The service refused or failed a request; the message is the service's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Calls block until the work is done. A call cut off by the network is repeated and applied once."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry_s: float = 60.0,
    ) -> None:
        """Nothing is sent yet.

        Args:
            base_url: of the service.
            api_key: needed when the service runs with keys.
            timeout_s: for one call.
            retry_s: how long a call is repeated while the service cannot be reached or is busy.
        """
        headers = {} if api_key is None else {"X-API-Key": api_key}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s)
        self._retry_s = retry_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def add_lora(
        self,
        base_model: str = "base",
        *,
        rank: int = 16,
        alpha: float = 32.0,
        targets: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Makes an adapter: ``{"model_id": "base_lora_..."}``."""
        body: dict[str, Any] = {"base_model": base_model, "rank": rank, "alpha": alpha}
        if targets is not None:
            body["targets"] = list(targets)
        if seed is not None:
            body["seed"] = seed
        return self._post("/add_lora", body)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Mapping[str, Any]],
        *,
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Adds the gradient of a batch: ``{"loss": sum over tokens, "logprobs": [[...]]}``.

        Args:
            model_id: of the adapter.
            data: ``{"prompt", "completion"}`` texts, or ``{"input_ids", "target_tokens", ...}`` already shifted, with
                the inputs of the loss (``weights``; or ``logprobs`` and ``advantages``).
            loss_fn: cross_entropy, importance_sampling, ppo, cispo, dro or gspo.
            loss_fn_config: e.g. ``{"clip_low_threshold": 0.8}``.
        """
        body = {
            "model_id": model_id,
            "data": [dict(datum) for datum in data],
            "loss_fn": loss_fn,
            "loss_fn_config": dict(loss_fn_config or {}),
        }
        return self._post("/forward_backward", body)

    def optim_step(self, model_id: str, *, learning_rate: float = 1e-4, **adam: float) -> dict[str, Any]:
        """One AdamW step: ``{"step", "grad_norm"}``.

        Args:
            model_id: of the adapter.
            learning_rate: of this step.
            adam: beta1, beta2, eps, weight_decay, grad_clip_norm.
        """
        return self._post("/optim_step", {"model_id": model_id, "learning_rate": learning_rate, **adam})

    def sample(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        model_id: str = "base",
        num_samples: int = 1,
        sampling_params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Samples the newest version of an adapter, or ``model_id@version``.

        Returns:
            ``{"model_id": "name@version", "completions": [[{"text", "tokens", "logprobs", "stop_reason"}]]}``, one
            list per prompt.
        """
        body = {
            "model_id": model_id,
            "prompts": [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts],
            "num_samples": num_samples,
            "sampling_params": dict(sampling_params or {}),
        }
        return self._post("/sample", body)

    def list_lora_adapters(self) -> list[dict[str, Any]]:
        adapters: list[dict[str, Any]] = self._request("GET", "/list_lora_adapters", None)["adapters"]
        return adapters

    def register_lora_adapter(self, *, adapter_id: str, lora_path: str) -> dict[str, Any]:
        """Makes an existing PEFT folder, below the service's adapters' directory, an adapter of that name."""
        return self._post("/register_lora_adapter", {"adapter_id": adapter_id, "lora_path": lora_path})

    def remove(self, model_id: str) -> dict[str, Any]:
        return self._post("/remove", {"model_id": model_id})

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """One call under one key, repeated while the service is away or busy."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        deadline = time.monotonic() + self._retry_s
        wait = 0.1
        while True:
            try:
                response = self._http.request(method, path, json=body, headers=headers)
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise ServiceError(f"{self._http.base_url} cannot be reached: {error}", 0) from error
            else:
                if response.status_code not in RETRIED or time.monotonic() > deadline:
                    return _result(response)
            time.sleep(wait)
            wait = min(2 * wait, 5.0)


def _result(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = {"detail": response.text[:300]}
    if response.is_success:
        result: dict[str, Any] = value
        return result
    raise ServiceError(f"{response.request.url.path}: {value.get('detail', value)}", response.status_code)
