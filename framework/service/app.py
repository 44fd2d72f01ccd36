"""The HTTP application: routes, middlewares and error handlers put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from framework.service import routes_openai, routes_rest, routes_simple, routes_tinker
from framework.service.http import BodyLimit, add_error_handlers, log_requests
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
    for routes in (routes_tinker, routes_rest, routes_simple, routes_openai):
        app.include_router(routes.router)
    app.add_api_route("/healthz", healthz, methods=["GET"], tags=["operation"])
    app.add_middleware(BaseHTTPMiddleware, dispatch=log_requests)
    app.add_middleware(BodyLimit, max_bytes=service.config.max_body_mib << 20)
    if service.config.auth == "local":  # a web page must not reach the loopback service under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    add_error_handlers(app)
    return app


async def healthz() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})
