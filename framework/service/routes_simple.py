"""Plain JSON over HTTP for :mod:`framework.client`: one call, one answer, no futures to poll.

An adapter made here is a version from its creation and after every optim_step, and a PEFT folder each time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from framework.lora.peft_io import load_peft
from framework.lora.spec import TARGETS, LoraSpec
from framework.service.adapters import NAME
from framework.service.ops import CreateAdapter, RequestError, Sample
from framework.service.requests import stop_params
from framework.service.routes_tinker import Id, Svc, Who
from framework.service.service import Caller, Service
from framework.service.text import cut_at_stop, prompt_tokens
from framework.service.wire import JSON, check_tokens
from framework.types import Prompt, SamplingParams

router = APIRouter(tags=["simple"])
Key = Annotated[str | None, Header(alias="Idempotency-Key", max_length=128)]
Name = Annotated[str, Field(pattern=NAME.pattern, max_length=100)]


class Strict(BaseModel):
    """Unknown fields are an error: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class AddLora(Strict):
    """The shape of a new adapter."""

    base_model: str = "base"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0.0, le=1e6)
    targets: list[str] = Field(default=list(TARGETS), min_length=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)


class SimpleDatum(Strict):
    """Text (``prompt``, ``completion``), or tokens already shifted (``input_ids`` and the inputs of the loss)."""

    prompt: str | None = None
    completion: str | None = None
    input_ids: list[int] | None = None
    target_tokens: list[int] | None = None
    weights: list[float] | None = None
    logprobs: list[float] | None = None
    advantages: list[float] | None = None
    sequence_ratio_mask: list[float] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> SimpleDatum:
        text, tokens = self.completion is not None, self.input_ids is not None
        if text == tokens or (tokens and self.target_tokens is None):
            raise ValueError("give prompt and completion, or input_ids and target_tokens")
        return self


class ForwardBackward(Strict):
    """A batch and its loss."""

    model_id: Id
    data: list[SimpleDatum] = Field(min_length=1)
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, float] = {}


class OptimStepBody(Strict):
    """The hyper-parameters of one step."""

    model_id: Id
    learning_rate: float = Field(default=1e-4, ge=0.0, le=1e3)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-12, ge=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    grad_clip_norm: float = Field(default=0.0, ge=0.0)


class SimpleSampling(Strict):
    """How to sample."""

    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=-1, ge=-1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    stop: str | list[str] | list[int] | None = None


class SampleBody(Strict):
    """What to sample from which model."""

    model_id: str = Field(default="base", max_length=300)
    prompts: list[str | list[int]] = Field(min_length=1, max_length=1024)
    num_samples: int = Field(default=1, ge=1, le=128)
    sampling_params: SimpleSampling = SimpleSampling()


class RegisterLora(Strict):
    """Which folder becomes which adapter."""

    adapter_id: Name
    lora_path: str = Field(min_length=1, max_length=4096)


class Remove(Strict):
    """Which adapter."""

    model_id: Id


@router.post("/add_lora")
async def add_lora(body: AddLora, request: Request, svc: Svc, who: Who, key: Key = None) -> Response:
    """A fresh adapter; it is the base model until it is trained."""
    svc.model.check(body.base_model)
    if body.rank > svc.limits.max_rank:
        raise RequestError(f"rank={body.rank}: this server takes at most {svc.limits.max_rank}")
    spec = LoraSpec(rank=body.rank, alpha=body.alpha, targets=tuple(body.targets))
    token = secrets.token_hex(4) if key is None else _token(who, key)
    seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
    adapter_id = f"base_lora_{token}"
    return await _create(svc, who, adapter_id, CreateAdapter(spec=spec, seed=seed), await request.body())


@router.post("/register_lora_adapter")
async def register_lora_adapter(body: RegisterLora, request: Request, svc: Svc, who: Who) -> Response:
    """An adapter that exists as a PEFT folder below the data directory or the adapters' directory."""
    await svc.bring_folders()  # it may be another adapter's
    folder = _inside(svc, body.lora_path)
    spec, _ = await asyncio.to_thread(load_peft, folder)
    if spec.rank > svc.limits.max_rank:
        raise RequestError(f"the adapter has rank {spec.rank}, this server takes at most {svc.limits.max_rank}")
    op = CreateAdapter(spec=spec, seed=0, source=str(folder))
    return await _create(svc, who, body.adapter_id, op, await request.body())


async def _create(svc: Service, who: Caller, adapter_id: str, op: CreateAdapter, payload: bytes) -> Response:
    info = {"simple": True, "source": op.source, "optimizer": False}
    request_id = svc.create_adapter(
        adapter_id=adapter_id, op=op, kind="simple.create_model", payload=payload, owner=who.owner, session_id=None,
        info=info,
    )  # fmt: skip
    return _plain(await svc.wait(request_id, who.owner))


def _token(who: Caller, key: str) -> str:
    """The same for the same caller and key, so that a repeated add_lora is the same adapter."""
    return hashlib.sha256(f"{who.owner}\n{key}".encode()).hexdigest()[:16]


def _inside(svc: Service, given: str) -> Path:
    """The folder, if it is below one of the service's own.

    Raises:
        RequestError: it is elsewhere, or is no folder; the message does not tell which.
    """
    paths = svc.adapters.paths
    for root in (paths.lora_dir, paths.data_dir):
        folder = (root / given).resolve()
        if folder.is_relative_to(root) and os.path.isdir(folder):  # noqa: PTH112 - False for a name that is too long
            return folder
    raise RequestError(
        f"lora_path={given!r} is not a folder below {paths.lora_dir}; copy the adapter there and give its name"
    )


@router.post("/forward_backward")
async def forward_backward(body: ForwardBackward, request: Request, svc: Svc, who: Who, key: Key = None) -> Response:
    """Adds the gradient of a batch; the loss is a sum over tokens."""
    return await _train(svc, who, "simple.forward_backward", body.model_id, await request.body(), key)


@router.post("/optim_step")
async def optim_step(body: OptimStepBody, request: Request, svc: Svc, who: Who, key: Key = None) -> Response:
    """One AdamW step. The new weights can be sampled, and are a PEFT folder, when this answers."""
    return await _train(svc, who, "simple.optim_step", body.model_id, await request.body(), key)


@router.post("/remove")
async def remove(body: Remove, request: Request, svc: Svc, who: Who) -> Response:
    """Forgets an adapter and its folder; checkpoints stay."""
    return await _train(svc, who, "simple.remove", body.model_id, await request.body(), None)


async def _train(svc: Service, who: Caller, kind: str, model_id: str, payload: bytes, key: str | None) -> Response:
    request_id = svc.train(kind=kind, adapter_id=model_id, seq=None, payload=payload, caller=who, dedupe=key)
    return _plain(await svc.wait(request_id, who.owner))


def _plain(outcome: Any) -> Response:
    """Outcomes as HTTP: a failure is 400 or 500 with ``detail``."""
    if not outcome.failed:
        return Response(outcome.body, media_type=JSON)
    failure = json.loads(outcome.body)
    return JSONResponse({"detail": failure["error"]}, status_code=400 if failure["category"] == "user" else 500)


@router.post("/sample")
async def sample(body: SampleBody, request: Request, svc: Svc, who: Who) -> Response:
    """Completions of each prompt, from the newest version of ``model_id`` or a pinned ``model_id@version``."""
    version = await svc.resolve_model(body.model_id, who)
    params = body.sampling_params
    ops = []
    for prompt in body.prompts:
        tokens = prompt_tokens(svc.model.tokenizer, prompt)
        room = check_tokens("prompt", tokens, svc.limits.model)
        if not room:
            raise RequestError(f"the prompt fills the context of {svc.limits.model.max_tokens} tokens")
        sampling = SamplingParams(
            max_tokens=min(params.max_tokens, room),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            seed=params.seed,
            **stop_params(params.stop),
        )
        ops.append(
            Sample(prompt=Prompt(token_ids=tokens), sampling=sampling, num_samples=body.num_samples, version=version)
        )
    results = await svc.sample_now(ops, who, request.is_disconnected)
    decode = svc.model.tokenizer.decode
    completions = [
        [
            {
                "text": cut_at_stop(decode(list(c.token_ids), skip_special_tokens=True), op.sampling.stop),
                "tokens": list(c.token_ids),
                "logprobs": list(c.sampling_logprobs),
                "stop_reason": c.stop_reason,
            }
            for c in done
        ]
        for op, done in zip(ops, results, strict=True)
    ]
    name = body.model_id if version is None else f"{version[0]}@{version[1]}"
    return JSONResponse({"model_id": name, "completions": completions})


@router.get("/list_lora_adapters")
async def list_lora_adapters(svc: Svc, who: Who) -> dict[str, Any]:
    """The caller's adapters, those of the SDK included."""
    rows = svc.store.all("SELECT * FROM adapters WHERE owner=? AND removed=0 ORDER BY created", who.owner)
    adapters = []
    for row in rows:
        newest = svc.adapters.newest_version(row["adapter_id"])
        simple = bool(row["info"].get("simple"))
        adapters.append(
            {
                "model_id": row["adapter_id"],
                "rank": row["spec"]["rank"],
                "alpha": row["spec"]["alpha"],
                "targets": row["spec"]["targets"],
                "version": None if newest is None else newest[1],
                "lora_path": str(svc.adapters.paths.peft(row["adapter_id"])) if simple else None,
            }
        )
    return {"adapters": adapters}
