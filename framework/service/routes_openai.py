"""OpenAI-compatible endpoints. ``model`` is the base model, an adapter (its newest version), or ``adapter@version``."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from framework.service.ops import RequestError, Sample
from framework.service.requests import stop_params
from framework.service.routes_tinker import Svc, Who
from framework.service.service import Caller, Service
from framework.service.text import TextStream, chat_tokens, cut_at_stop, prompt_tokens
from framework.service.wire import check_tokens
from framework.types import Completion, Prompt, SamplingParams

router = APIRouter(prefix="/v1", tags=["openai"])
Stop = str | list[str] | None
MAX_PROMPTS = 64


class Generation(BaseModel):
    """What both endpoints take. A field that is not here and could change the result is refused by the model."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(max_length=300)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    temperature: float | None = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float | None = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int | None = Field(default=-1, ge=-1, le=1 << 31)
    n: int | None = Field(default=1, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0


class CompletionRequest(Generation):
    """OpenAI's completion request, as far as it is supported."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: None = None


class ChatMessage(BaseModel):
    """A message of text."""

    model_config = ConfigDict(extra="ignore")
    role: str = Field(max_length=64)
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Generation):
    """OpenAI's chat request, as far as it is supported."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=0, ge=0, le=20)
    tools: None = None


@router.get("/models")
async def models(svc: Svc, who: Who) -> dict[str, Any]:
    """The base model, the caller's adapters, and each of their versions that is kept."""
    cards = [_card(svc.model.name, svc.started, None)]
    rows = svc.store.all("SELECT * FROM adapters WHERE owner=? AND removed=0 ORDER BY created", who.owner)
    for row in rows:
        cards.append(_card(row["adapter_id"], row["created"], svc.model.name))
        versions = svc.store.all("SELECT * FROM versions WHERE adapter_id=? ORDER BY version", row["adapter_id"])
        cards += [_card(f"{v['adapter_id']}@{v['version']}", v["created"], v["adapter_id"]) for v in versions]
    return {"object": "list", "data": cards}


def _card(name: str, created: float, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "tandem", "parent": parent}


@router.get("/models/{name:path}")
async def model(name: str, svc: Svc, who: Who) -> dict[str, Any]:
    """Whether a model can be used, and what it is made of."""
    version = await svc.resolve_model(name, who)
    return _card(name, svc.started, None if version is None else svc.model.name)


@router.post("/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, svc: Svc, who: Who) -> Response:
    """Completions of one or several prompts of text or tokens."""
    raw = body.prompt
    several = isinstance(raw, list) and raw and not isinstance(raw[0], int)
    prompts = [prompt_tokens(svc.model.tokenizer, p) for p in (raw if several else [raw])]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts; allowed are 1 to {MAX_PROMPTS}")
    limit = 16 if body.max_tokens is None else body.max_tokens
    ops = await _ops(svc, who, body, prompts, limit, body.logprobs or 0)
    shape = _CompletionShape(svc, body, with_logprobs=body.logprobs is not None)
    return await _answer(svc, who, request, body, ops, shape)


@router.post("/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request, svc: Svc, who: Who) -> Response:
    """Answers to a conversation, by the model's own chat template."""
    messages = [{"role": message.role, "content": _content(message.content)} for message in body.messages]
    prompt = chat_tokens(svc.model.tokenizer, messages)
    limit = body.max_completion_tokens or body.max_tokens
    ops = await _ops(svc, who, body, [prompt], limit, body.top_logprobs or 0)
    return await _answer(svc, who, request, body, ops, _ChatShape(svc, body, with_logprobs=bool(body.logprobs)))


def _content(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
            raise RequestError("message parts must be of type text")
        return "".join(part["text"] for part in content)
    return content or ""


async def _ops(
    svc: Service, who: Caller, body: Generation, prompts: list[tuple[int, ...]], limit: int | None, top: int
) -> list[Sample]:
    version = await svc.resolve_model(body.model, who)
    ops = []
    for tokens in prompts:
        room = check_tokens("prompt", tokens, svc.limits.model)
        if limit is not None and limit > room:
            raise RequestError(
                f"{len(tokens)} prompt tokens and max_tokens={limit} exceed the context of "
                f"{svc.limits.model.max_tokens} tokens"
            )
        sampling = SamplingParams(
            max_tokens=limit or room,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=-1 if body.top_k is None else (body.top_k or -1),
            seed=None if body.seed is None else body.seed % (1 << 31),
            top_logprobs=top,
            **stop_params(body.stop or None),
        )
        ops.append(
            Sample(
                prompt=Prompt(token_ids=tokens),
                sampling=sampling,
                num_samples=body.n or 1,
                version=version,
                stream=bool(body.stream),
            )
        )
    return ops


class _CompletionShape:
    """The JSON of /v1/completions."""

    object = chunk_object = "text_completion"

    def __init__(self, svc: Service, body: Generation, *, with_logprobs: bool) -> None:
        self.tokenizer, self.with_logprobs = svc.model.tokenizer, with_logprobs
        self.id = f"cmpl-{secrets.token_hex(12)}"

    def choice(self, index: int, text: str, done: Completion) -> dict[str, Any]:
        logprobs = None
        if self.with_logprobs:
            tokens = [self._token(token) for token in done.token_ids]
            offsets = [sum(len(t) for t in tokens[:i]) for i in range(len(tokens))]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": list(done.sampling_logprobs),
                "top_logprobs": [{self._token(t): v for t, v in row} for row in done.top_logprobs or ()] or None,
                "text_offset": offsets,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": done.stop_reason}

    def delta(self, index: int, text: str, finish_reason: str | None, first: bool) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _token(self, token: int) -> str:
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text


class _ChatShape(_CompletionShape):
    """The JSON of /v1/chat/completions."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, svc: Service, body: Generation, *, with_logprobs: bool) -> None:
        super().__init__(svc, body, with_logprobs=with_logprobs)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"

    def choice(self, index: int, text: str, done: Completion) -> dict[str, Any]:
        content = None
        if self.with_logprobs:
            rows = done.top_logprobs or ((),) * len(done.token_ids)
            content = [
                {**self._entry(token, value), "top_logprobs": [self._entry(t, v) for t, v in row]}
                for token, value, row in zip(done.token_ids, done.sampling_logprobs, rows, strict=True)
            ]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": None if content is None else {"content": content, "refusal": None},
            "finish_reason": done.stop_reason,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def delta(self, index: int, text: str, finish_reason: str | None, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        if text:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


async def _answer(
    svc: Service, who: Caller, request: Request, body: Generation, ops: list[Sample], shape: _CompletionShape
) -> Response:
    envelope = {"id": shape.id, "created": int(time.time()), "model": body.model}
    if body.stream:
        if len(ops) > 1:
            raise RequestError("streaming takes one prompt")
        events = _events(svc, who, ops[0], shape, envelope, body.stream_options or {})
        return StreamingResponse(events, media_type="text/event-stream")
    results = await svc.sample_now(ops, who, request.is_disconnected)
    choices: list[dict[str, Any]] = []
    for op, done in zip(ops, results, strict=True):
        for completion in done:
            text = svc.model.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
            choices.append(shape.choice(len(choices), cut_at_stop(text, op.sampling.stop), completion))
    usage = _usage(ops, [len(c.token_ids) for done in results for c in done])
    return JSONResponse({**envelope, "object": shape.object, "choices": choices, "usage": usage})


def _usage(ops: list[Sample], completions: list[int]) -> dict[str, int]:
    prompt, completion = sum(len(op.prompt.token_ids) for op in ops), sum(completions)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(
    svc: Service,
    who: Caller,
    op: Sample,
    shape: _CompletionShape,
    envelope: Mapping[str, Any],
    options: Mapping[str, Any],
) -> AsyncIterator[str]:
    """Server-sent events: one per piece of text, the finish reasons, usage if asked for, then [DONE]."""
    base = {**envelope, "object": shape.chunk_object}
    streams = [TextStream(tokenizer=svc.model.tokenizer, stop=op.sampling.stop) for _ in range(op.num_samples)]
    first = [True] * op.num_samples

    def chunk(index: int, text: str, reason: str | None) -> str:
        choice = shape.delta(index, text, reason, first[index])
        first[index] = False
        return f"data: {json.dumps({**base, 'choices': [choice]})}\n\n"

    async with svc.sample_stream(op, who) as flow:
        async for index, tokens in flow.tokens():
            piece = streams[index].push(tokens)
            if piece or first[index]:
                yield chunk(index, piece, None)
        outcome = await flow.outcome()
        if outcome.failed:
            yield f"data: {outcome.body.decode()}\n\n"
            return
        for index, completion in enumerate(outcome.value):
            yield chunk(index, streams[index].finish(), completion.stop_reason)
        if options.get("include_usage"):
            usage = _usage([op], [len(stream.tokens) for stream in streams])
            yield f"data: {json.dumps({**base, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
