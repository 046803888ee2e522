"""The FastAPI application."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from pydantic.warnings import UnsupportedFieldAttributeWarning
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from mlx_server import __version__
from mlx_server.api import description, health, metrics
from mlx_server.api.admin import ADMIN
from mlx_server.api.anthropic.routes import ANTHROPIC
from mlx_server.api.http import failures
from mlx_server.api.http.body_limit import BodyLimit
from mlx_server.api.http.context import RequestContext
from mlx_server.api.http.guards import AvailabilityCheck, HeadAsGet, HostCheck, OriginCheck
from mlx_server.api.http.limits import RateLimits
from mlx_server.api.http.openapi import any_error, documented
from mlx_server.api.http.stopping import Stopping
from mlx_server.api.http.wire import ApiProtocol, Wires
from mlx_server.api.ollama.routes import OLLAMA
from mlx_server.api.openai.responses.thinking import Sealer
from mlx_server.api.openai.routes import OPENAI, RESPONSES
from mlx_server.api.page import routes as page
from mlx_server.api.page.process import PageProcess, installed
from mlx_server.api.reloading import Reloader
from mlx_server.api.rerank.routes import RERANK
from mlx_server.config import Settings
from mlx_server.events import setup_logging
from mlx_server.keys import KeyRing, warn_if_exposed
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.pulls import PullManager
from mlx_server.models.store.sources import ModelSources
from mlx_server.models.text.client import TextProcess
from mlx_server.services.backpressure import Backpressure
from mlx_server.services.embeddings import EmbeddingService
from mlx_server.services.history import History
from mlx_server.services.inference import InferenceService
from mlx_server.services.records import Records
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.record import RecentRequests
from mlx_server.telemetry.tracing import setup_tracing, untraced
from mlx_server.units import parse_seconds

# FastAPI silences this where it builds schemas; ours are built when they are first asked for.
warnings.filterwarnings("ignore", category=UnsupportedFieldAttributeWarning)

# FastAPI's own request spans: one per request, none per chunk, no bodies or arguments.
REQUEST_SPANS = TelemetryConfig(operation_spans=False, logs=False, exclude=untraced)

# Before OpenAI, which takes what remains of the paths that they share.
PROTOCOLS = (ANTHROPIC, OLLAMA, RERANK, OPENAI, RESPONSES, ADMIN)
OTHERS = ApiProtocol(
    wire=OPENAI.wire, routers=(health.router, metrics.router, description.router), prefixes=()
)
ANY_ROUTE_ERRORS = (400, 403, 408, 413, 429, 431, 503)


def create_app(
    settings: Settings | None = None,
    catalog: Catalog | None = None,
    protocols: Sequence[ApiProtocol] = PROTOCOLS,
    reread: Callable[[], Settings] = Settings.load,
) -> FastAPI:
    """Without arguments settings are read, for ASGI servers' factories. Paths outside all
    `protocols` are answered as OpenAI's.
    """
    if settings is None:
        settings = Settings.load()
        setup_logging(
            settings.log_level, settings.log_format, settings.log_levels, settings.log_file
        )
    setup_tracing()
    wires = Wires(OPENAI.wire, protocols)
    stopping = Stopping(settings.grace_period)
    figures, recent = Metrics(), RecentRequests()
    keys = KeyRing.load(settings.api_keys, settings.admin_keys, settings.keys_file)
    app = FastAPI(
        title="mlx-server",
        version=__version__,
        summary="An inference server for MLX language models.",
        lifespan=_lifespan,
        # `api/description.py` has them, behind a key.
        openapi_url=None,
        middleware=_middleware(settings, figures, recent, stopping, wires, keys),
        redirect_slashes=False,
        telemetry=REQUEST_SPANS,
    )
    app.state.settings = settings
    app.state.wires = wires
    app.state.stopping = stopping
    app.state.metrics = figures
    app.state.recent = recent
    app.state.catalog = catalog or Catalog(ModelSources.of(settings))
    app.state.keys = keys
    warn_if_exposed(settings.keys_file)
    app.state.limits = RateLimits(settings.requests_per_minute, settings.tokens_per_minute)
    texts = TextProcess(settings.prompt_timeout, settings.stable_prompts)
    app.state.pool = ModelPoolManager(settings, app.state.catalog, texts=texts)
    app.state.reloader = Reloader(app.state, reread)
    app.state.history = History(app.state.pool, figures)
    app.state.pulls = PullManager(app.state.catalog)
    app.state.page = PageProcess()
    backpressure = _backpressure(settings)
    app.state.service = InferenceService(app.state.pool, backpressure)
    app.state.embeddings = EmbeddingService(app.state.pool, backpressure)
    app.state.records = Records(
        settings.records_path, settings.responses_limit_bytes, parse_seconds(settings.responses_age)
    )
    app.state.sealer = Sealer(settings.records_path.parent)
    figures.registry.register(metrics.PoolCollector(app.state.pool, texts))
    failures.install(app)
    _include(app, (*protocols, OTHERS))
    if settings.ui:
        app.include_router(page.router if installed() else page.absent)
    return app


def _middleware(
    settings: Settings,
    figures: Metrics,
    recent: RecentRequests,
    stopping: Stopping,
    wires: Wires,
    keys: KeyRing,
) -> list[Middleware]:
    """Outermost first."""
    layers = [
        Middleware(RequestContext, metrics=figures, recent=recent, wires=wires),
        Middleware(AvailabilityCheck, stopping=stopping),
        Middleware(
            HostCheck,
            host=settings.host,
            allowed_hosts=settings.allowed_hosts,
            asks_for_key=keys.guards("inference"),
        ),
    ]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                # Of pages that came from outside this network; their origins are named.
                allow_private_network=True,
                expose_headers=["x-request-id", "retry-after", *wires.exposed_headers],
            )
        )
    layers.append(Middleware(OriginCheck, origins=settings.cors_origins))
    layers.append(
        Middleware(BodyLimit, limit=settings.max_body_bytes, patience=settings.receive_timeout)
    )
    layers.append(Middleware(HeadAsGet))
    return layers


def _backpressure(settings: Settings) -> Backpressure:
    return Backpressure(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        queue_timeout=settings.queue_timeout,
        request_timeout=settings.request_timeout,
    )


def _include(app: FastAPI, protocols: Iterable[ApiProtocol]) -> None:
    for protocol in protocols:
        model = protocol.wire.error_model
        responses = documented(model, *ANY_ROUTE_ERRORS) | any_error(model)
        for router in protocol.routers:
            app.include_router(router, responses=responses)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    catalog: Catalog = app.state.catalog
    pool: ModelPoolManager = app.state.pool
    watchers = [
        asyncio.create_task(app.state.metrics.loop_lag.run()),
        asyncio.create_task(app.state.history.run()),
    ]
    try:
        wanted = [(await asyncio.to_thread(catalog.add, name)).id for name in settings.models]
        for name in settings.draft_models:
            await asyncio.to_thread(catalog.add, name)
        await pool.start(wanted)
        yield
    finally:
        await app.state.page.stop()
        await app.state.pulls.stop()
        await pool.stop()
        await app.state.records.close()
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
