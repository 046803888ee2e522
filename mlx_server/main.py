"""The FastAPI application: its parts, its routes, its start and stop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from mlx_server import __version__
from mlx_server.api import admin, health
from mlx_server.api import model_pulls as pulls
from mlx_server.api.http import failures as errors
from mlx_server.api.http.limits import RATE_HEADERS, RateLimits
from mlx_server.api.http.middleware import (
    BodyLimit,
    Doorkeeper,
    HostCheck,
    OriginCheck,
    RequestContext,
)
from mlx_server.api.http.stopping import Stopping
from mlx_server.api.openai import chat, completions, embeddings, models
from mlx_server.api.openai import tokens as tokenize
from mlx_server.config import Settings
from mlx_server.events import setup_logging
from mlx_server.keys import KeyRing, warn_if_exposed
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.pulls import PullManager
from mlx_server.models.store.sources import ModelSources
from mlx_server.services.backpressure import Backpressure
from mlx_server.services.embeddings import EmbeddingService
from mlx_server.services.inference import InferenceService
from mlx_server.telemetry import Metrics, setup_tracing, untraced

# Request spans come from FastAPI itself: one per request, none per chunk of a stream, and neither
# bodies nor arguments in them.
REQUEST_SPANS = TelemetryConfig(operation_spans=False, logs=False, exclude=untraced)


def create_app(settings: Settings | None = None, catalog: Catalog | None = None) -> FastAPI:
    """The application. Without arguments it reads its settings, for ASGI servers' factories."""
    if settings is None:
        settings = Settings.load()
        setup_logging(settings.log_level)
    setup_tracing()
    catalog = catalog or Catalog(ModelSources.of(settings))
    metrics = Metrics()
    stopping = Stopping(settings.grace_period)
    app = FastAPI(
        title="mlx-server",
        version=__version__,
        summary="An inference server for MLX language models.",
        lifespan=_lifespan,
        middleware=_middleware(settings, metrics, stopping),
        redirect_slashes=False,
        telemetry=REQUEST_SPANS,
        # Also keeps out the 422 that FastAPI would document and this server never sends.
        responses=errors.documented(400, 403, 408, 413, 429, 431, 503) | errors.ANY_ERROR,
    )
    app.state.settings = settings
    app.state.catalog = catalog
    app.state.metrics = metrics
    app.state.stopping = stopping
    app.state.keys = KeyRing.load(settings.api_keys, settings.admin_keys, settings.keys_file)
    warn_if_exposed(settings.keys_file)
    app.state.limits = RateLimits.of(settings)
    app.state.pool = ModelPoolManager(settings, catalog)
    app.state.pulls = PullManager(catalog)
    backpressure = Backpressure(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        queue_timeout=settings.queue_timeout,
        request_timeout=settings.request_timeout,
    )
    app.state.service = InferenceService(app.state.pool, backpressure)
    app.state.embeddings = EmbeddingService(app.state.pool, backpressure)
    metrics.registry.register(health.PoolCollector(app.state.pool))
    errors.install(app)
    for module in (chat, completions, embeddings, models, tokenize, admin, pulls, health):
        app.include_router(module.router)
    return app


def _middleware(settings: Settings, metrics: Metrics, stopping: Stopping) -> list[Middleware]:
    """From the outermost to the innermost."""
    layers = [
        Middleware(RequestContext, metrics=metrics),
        Middleware(Doorkeeper, stopping=stopping),
        Middleware(HostCheck, settings=settings),
    ]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after", *RATE_HEADERS],
            )
        )
    layers.append(Middleware(OriginCheck, origins=settings.cors_origins))
    layers.append(
        Middleware(BodyLimit, limit=settings.max_body_bytes, patience=settings.receive_timeout)
    )
    return layers


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    catalog: Catalog = app.state.catalog
    pool: ModelPoolManager = app.state.pool
    lag = asyncio.create_task(app.state.metrics.loop_lag.run())
    try:
        wanted = [(await asyncio.to_thread(catalog.add, name)).id for name in settings.models]
        await pool.start(wanted)
        yield
    finally:
        await app.state.pulls.stop()
        await pool.stop()
        lag.cancel()
        with suppress(asyncio.CancelledError):
            await lag
