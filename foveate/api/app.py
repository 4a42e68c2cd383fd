"""The HTTP application: every route, and what is around them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from foveate.api import docs
from foveate.api.body import read_chat_request
from foveate.api.chat import ChatService, unknown_model
from foveate.api.completion import Model, ModelList
from foveate.api.errors import (
    HungUp,
    handle_foveate_error,
    handle_hang_up,
    handle_http_error,
    json_response,
)
from foveate.api.forward import Forwarder
from foveate.api.identity import fingerprint
from foveate.api.incidents import Incidents
from foveate.api.middleware import AccessControl, RequestScope, cors_options
from foveate.api.pages import add_pages, add_status
from foveate.api.response import EventStream, unless_hung_up
from foveate.api.stream import Completion
from foveate.chat.assets import ModelAssets
from foveate.config import Settings
from foveate.engine.client import EngineClient
from foveate.errors import FoveateError, Unavailable
from foveate.machine import gpus, processes
from foveate.media.fetch import MediaFetcher
from foveate.telemetry import Metrics
from foveate.version import version
from foveate.vision.client import VisionClient

_STATS_SECONDS = 2.0


def create_app(
    settings: Settings,
    assets: ModelAssets,
    model_name: str,
    engine: EngineClient,
    vision: VisionClient,
    ui_socket: Path | None = None,
) -> FastAPI:
    """Make the application. It runs on the event loop on which the caller starts and closes the two clients.

    Args:
        settings: the whole service's.
        assets: what the checkpoint's folder says without its weights.
        model_name: the name that requests use.
        engine: where tokens come from.
        vision: where pictures are encoded.
        ui_socket: where the web chat listens, if there is one.
    """
    metrics = Metrics()
    metrics.info.info({"version": version(), "model": model_name})
    fetcher = MediaFetcher(settings.media)
    chat_page = None if ui_socket is None else Forwarder(ui_socket, settings.http.max_body_bytes)
    service = ChatService(
        assets,
        model_name,
        settings.media,
        settings.sampling,
        engine=engine,
        vision=vision,
        fetcher=fetcher,
        metrics=metrics,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await fetcher.close()
        if chat_page is not None:
            await chat_page.close()

    app = docs.DocumentedApp(
        title="Foveate",
        version=version(),
        lifespan=lifespan,
        # A redirect would repeat whatever host name the client sent.
        redirect_slashes=False,
        # The framework's own pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            FoveateError: handle_foveate_error,
            HTTPException: handle_http_error,
            HungUp: handle_hang_up,
            ClientDisconnect: handle_hang_up,
        },
    )
    app.state.incidents = Incidents(metrics)
    # The last one added is the outermost. A browser asks whether it may send a key before it sends one.
    app.add_middleware(AccessControl, settings=settings.http, incidents=app.state.incidents)
    if settings.http.cors_origins:
        app.add_middleware(CORSMiddleware, **cors_options(settings.http))
    app.add_middleware(RequestScope, metrics=metrics)
    _add_chat(app, service, settings.http.max_body_bytes)
    _add_models(app, model_name, engine)
    _add_status(app, model_name, engine, vision, metrics)
    add_status(app, model_name, engine, vision, app.state.incidents)
    add_pages(app, needs_key=bool(settings.http.api_key))
    if chat_page is not None:
        app.router.routes.extend(chat_page.routes())
    return app


def _add_chat(app: FastAPI, service: ChatService, max_body_bytes: int) -> None:
    system_fingerprint = fingerprint(service.model_name, service.assets)

    @app.post("/v1/chat/completions", openapi_extra=docs.CHAT_COMPLETION)
    async def create_chat_completion(http: Request) -> Response:
        """Answer a conversation, in one piece or as a stream of events."""
        arrived = time.perf_counter()
        chat_request = await read_chat_request(http, max_body_bytes)
        stream, options = chat_request.stream, chat_request.stream_options
        chat = await unless_hung_up(http.receive, service.plan(chat_request, arrived))
        # Let go of the request: its pictures are large.
        del chat_request
        completion = Completion(service, chat, system_fingerprint)
        if stream:
            return EventStream(completion.events(include_usage=bool(options and options.include_usage)))
        return json_response(await unless_hung_up(http.receive, completion.whole()))


def _add_models(app: FastAPI, model_name: str, engine: EngineClient) -> None:
    created = int(time.time())

    def model() -> Model:
        limit = engine.ready.max_seq_len if engine.ready else None
        return Model(id=model_name, created=created, max_model_len=limit)

    @app.get("/v1/models", openapi_extra=docs.MODEL_LIST)
    async def list_models() -> Response:
        """List the models that requests may name."""
        return json_response(ModelList(data=[model()]))

    @app.get("/v1/models/{model_id:path}", openapi_extra=docs.MODEL)
    async def retrieve_model(model_id: str) -> Response:
        """Describe one model."""
        if model_id != model_name:
            raise unknown_model(model_id, model_name)
        return json_response(model())


def _add_status(app: FastAPI, model_name: str, engine: EngineClient, vision: VisionClient, metrics: Metrics) -> None:
    @app.get("/health", openapi_extra=docs.STATUS)
    async def health() -> Response:
        """Say that this process lives."""
        return json_response({"status": "ok"})

    @app.get("/ready", openapi_extra=docs.STATUS)
    async def ready() -> Response:
        """Say whether requests will be answered: 200, or 503 and why not. Without pictures, it is ``degraded``."""
        if engine.ready is None:
            raise Unavailable("The engine is not ready: it is loading its model, or is being restarted.")
        if problems := vision.problems:
            return json_response({"status": "degraded", "problems": problems})
        return json_response({"status": "ready"})

    @app.get("/version", openapi_extra=docs.STATUS)
    async def show_version() -> Response:
        """Name the server's version and its model."""
        return json_response({"version": version(), "model": model_name})

    @app.get("/metrics", openapi_extra=docs.METRICS)
    async def show_metrics() -> Response:
        """Show counters and times in Prometheus' format."""
        engine_stats, *vision_stats = await asyncio.gather(
            _engine_stats(engine), *(encoder.stats() for encoder in vision.encoders)
        )
        metrics.engine.update(engine_stats)
        names = [encoder.name for encoder in vision.encoders]
        transports = {one.name: one.transport if one.usable else "" for one in vision.encoders}
        metrics.vision.update(dict(zip(names, vision_stats, strict=True)), transports)
        metrics.machine.update(*await asyncio.to_thread(lambda: (gpus(), processes())))
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _engine_stats(engine: EngineClient) -> dict[str, Any]:
    """Ask the engine for its numbers; one that is away, or busy for long, has none."""
    if engine.ready is None:
        return {}
    try:
        async with asyncio.timeout(_STATS_SECONDS):
            stats = msgspec.structs.asdict(await engine.stats())
            return {**stats, "max_batch_size": engine.ready.max_batch_size}
    except (FoveateError, TimeoutError):
        return {}
