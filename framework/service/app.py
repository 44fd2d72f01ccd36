"""The HTTP application: routes, middlewares and error handlers put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from framework.service import routes_keys, routes_openai, routes_rest, routes_simple, routes_tinker
from framework.service.http import BodyLimit, add_error_handlers, log_requests, service_of
from framework.service.service import Service

LOCAL_HOSTS = ["127.0.0.1", "localhost", "[::1]", "::1", "testserver"]


def build_app(service: Service) -> FastAPI:
    """The app of one service. Serve it on one event loop only."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.futures.attach(asyncio.get_running_loop())
        yield

    app = FastAPI(title="Tandem", version="1", lifespan=lifespan)
    app.state.service = service
    for routes in (routes_tinker, routes_rest, routes_simple, routes_openai, routes_keys):
        app.include_router(routes.router)
    for path, handler in (("/healthz", healthz), ("/readyz", readyz), ("/metrics", metrics)):
        app.add_api_route(path, handler, methods=["GET"], tags=["operation"], response_model=None)
    app.add_middleware(BaseHTTPMiddleware, dispatch=log_requests)
    app.add_middleware(BodyLimit, max_bytes=service.config.max_body_mib << 20)
    if service.config.auth == "local":  # a web page must not reach the loopback service under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    add_error_handlers(app)
    return app


async def healthz() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Requests are taken: the server is not stopping."""
    service = service_of(request)
    if service.stopping:
        return JSONResponse({"status": "stopping"}, status_code=503)
    return JSONResponse({"status": "ready", "waiting": len(service.futures.pending)})


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = service_of(request)
    service.metrics.waiting.set(len(service.futures.pending))
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
