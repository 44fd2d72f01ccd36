"""What all routes share: who is calling, the service, limits on bodies and rates, errors to status codes, logs."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from framework.errors import FrameworkError
from framework.service.ops import RequestError
from framework.service.service import Caller, Service

log = logging.getLogger(__name__)


def service_of(request: Request) -> Service:
    """The service this app serves."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    """Who sent the request, by ``X-API-Key`` or ``Authorization: Bearer``.

    Raises:
        RequestError: 401 without a key, 403 with a wrong one, 429 when the owner sends too fast.
    """
    service = service_of(request)
    caller = service.keys.caller(presented_key(request))
    service.rates.take(caller.owner)
    return caller


def presented_key(request: Request) -> str | None:
    """The key a request brings, if any."""
    key = request.headers.get("x-api-key")
    if key:
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


@dataclass(slots=True, kw_only=True)
class Rates:
    """A token bucket per owner, one second deep."""

    per_s: float
    buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, owner: str) -> None:
        """Raises RequestError 429 when the owner's bucket is empty; 0 per second is no limit."""
        if not self.per_s:
            return
        now = time.monotonic()
        left, then = self.buckets.get(owner, (max(self.per_s, 1.0), now))
        left = min(max(self.per_s, 1.0), left + (now - then) * self.per_s)
        if left < 1.0:
            raise RequestError(f"more than service.max_requests_per_s={self.per_s:g} requests", status=429)
        self.buckets[owner] = (left - 1.0, now)


class BodyLimit:
    """Answers 413 as soon as a body is larger than allowed, whatever its headers said."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise _BodyTooLarge
            return message

        async def unless_refused(message: Message) -> None:
            if received <= self.max_bytes:  # else whatever the app made of the exception is not the answer
                await send(message)

        with suppress(_BodyTooLarge):
            await self.app(scope, limited, unless_refused)
        if received > self.max_bytes:
            detail = {"detail": f"the body is larger than service.max_body_mib={self.max_bytes >> 20} MiB"}
            await JSONResponse(detail, status_code=413)(scope, receive, send)


class _BodyTooLarge(Exception):
    pass


def add_error_handlers(app: FastAPI) -> None:
    """One table from errors to status codes. 409 and 5xx make the SDK retry, so only the stop answers 503."""

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return _error(request, str(error), error.status)

    @app.exception_handler(FrameworkError)
    async def framework_error(request: Request, error: FrameworkError) -> Response:
        return _error(request, str(error), 400 if isinstance(error, ValueError) else 500)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        complaints = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:8]]
        return _error(request, "; ".join(complaints), 422)


def _error(request: Request, message: str, status: int) -> Response:
    """``detail``, or under /v1 the error object that OpenAI's clients read."""
    body: dict[str, Any] = {"detail": message}
    if request.url.path.startswith("/v1/"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers={"retry-after": "1"} if status in (429, 503) else None)


async def log_requests(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Gives every request an id, in the reply's ``X-Request-Id`` and in one log record."""
    given = request.headers.get("x-request-id", "")
    request_id = given if 0 < len(given) <= 64 and given.isascii() and given.isprintable() else secrets.token_hex(8)
    start = time.perf_counter()
    response = await call_next(request)
    spent = time.perf_counter() - start
    response.headers["x-request-id"] = request_id
    route: Any = request.scope.get("route")
    path = getattr(route, "path", "unmatched")
    service_of(request).metrics.observe_http(request.method, path, response.status_code, spent)
    log.info(
        "request",
        extra={
            "request_id": request_id, "method": request.method, "path": path, "status": response.status_code,
            "ms": round(spent * 1000, 2),
        },
    )  # fmt: skip
    return response
