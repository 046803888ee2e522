"""What routes depend on: the application's parts, and the caller."""

from dataclasses import replace
from ipaddress import IPv6Network
from typing import Annotated, cast

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from opentelemetry import trace
from starlette.requests import Request

from mlx_server.api.http.context import ANSWER_HEADERS
from mlx_server.api.http.limits import RateLimits
from mlx_server.api.http.wire import wire_of
from mlx_server.config import Settings
from mlx_server.errors import Forbidden, Unauthorized
from mlx_server.keys import KeyRing
from mlx_server.keys import Scope as KeyScope
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.pulls import PullManager
from mlx_server.schemas.internal import Caller
from mlx_server.services.embeddings import EmbeddingService
from mlx_server.services.history import History
from mlx_server.services.inference import InferenceService
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.record import RecentRequests, RequestRecord

PURPOSES: dict[KeyScope, str] = {"inference": "inference", "admin": "administrators"}
CLIENT_PREFIX = 64
"""Bits of an IPv6 address that identify a client's network."""


# Coroutines, because FastAPI runs plain functions in threads.
async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _catalog(request: Request) -> Catalog:
    return cast(Catalog, request.app.state.catalog)


async def _pool(request: Request) -> ModelPoolManager:
    return cast(ModelPoolManager, request.app.state.pool)


async def _pulls(request: Request) -> PullManager:
    return cast(PullManager, request.app.state.pulls)


async def _service(request: Request) -> InferenceService:
    return cast(InferenceService, request.app.state.service)


async def _embeddings(request: Request) -> EmbeddingService:
    return cast(EmbeddingService, request.app.state.embeddings)


async def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


async def _recent(request: Request) -> RecentRequests:
    return cast(RecentRequests, request.app.state.recent)


async def _history(request: Request) -> History:
    return cast(History, request.app.state.history)


async def _keys(request: Request) -> KeyRing:
    return cast(KeyRing, request.app.state.keys)


async def _limits(request: Request) -> RateLimits:
    return cast(RateLimits, request.app.state.limits)


SettingsDep = Annotated[Settings, Depends(_settings)]
CatalogDep = Annotated[Catalog, Depends(_catalog)]
PoolDep = Annotated[ModelPoolManager, Depends(_pool)]
PullsDep = Annotated[PullManager, Depends(_pulls)]
ServiceDep = Annotated[InferenceService, Depends(_service)]
EmbeddingsDep = Annotated[EmbeddingService, Depends(_embeddings)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
HistoryDep = Annotated[History, Depends(_history)]
RecentDep = Annotated[RecentRequests, Depends(_recent)]
KeysDep = Annotated[KeyRing, Depends(_keys)]
LimitsDep = Annotated[RateLimits, Depends(_limits)]

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
ShownKey = Annotated[str | None, Depends(APIKeyHeader(name="x-api-key", auto_error=False))]


async def authenticated(
    request: Request, keys: KeysDep, bearer: Bearer, api_key: ShownKey
) -> Caller:
    """Raises Unauthorized for a missing or unknown key, if any are configured."""
    return _caller(request, keys, "inference", bearer.credentials if bearer else api_key)


async def administrator(
    request: Request, keys: KeysDep, bearer: Bearer, api_key: ShownKey
) -> Caller:
    """Requires an admin key, or any key if no admin key exists. Raises Unauthorized, Forbidden."""
    return _caller(request, keys, "admin", bearer.credentials if bearer else api_key)


async def _limited(
    request: Request, limits: LimitsDep, caller: Annotated[Caller, Depends(authenticated)]
) -> Caller:
    """Raises TooManyRequests."""
    refusal = await limits.refusal(caller.key)
    wire, windows = wire_of(request.scope), await limits.windows(caller.key)
    headers = [pair for kind, window in windows.items() for pair in wire.rate_headers(kind, window)]
    setattr(request.state, ANSWER_HEADERS, headers)
    if refusal is not None:
        raise refusal
    return replace(caller, charge=limits.charge_of(caller.key))


CallerDep = Annotated[Caller, Depends(_limited)]
AdminDep = Depends(administrator)


def _caller(request: Request, keys: KeyRing, scope: KeyScope, shown: str | None) -> Caller:
    request_id = request.state.request_id
    record: RequestRecord = request.state.record
    record.client = _address(request)
    key = keys.find(shown) if shown else None
    admin = key.permits("admin") if key else not keys.guards("admin")
    if not keys.guards(scope):
        return Caller(request_id, record.client, admin, record=record)
    if not shown:
        raise Unauthorized("No API key was given: send `Authorization: Bearer <key>`.")
    if key is None:
        raise Unauthorized("The API key is not known to this server.")
    request.state.key = record.client = key.name
    trace.get_current_span().set_attribute("mlx_server.key", key.name)
    if not key.permits(scope):
        raise Forbidden(f"This API key is not one for {PURPOSES[scope]}.")
    return Caller(request_id, key.name, admin, record=record)


def _address(request: Request) -> str:
    host = request.client.host if request.client else ""
    if ":" not in host:
        return host
    try:
        return str(IPv6Network((host.partition("%")[0], CLIENT_PREFIX), strict=False))
    except ValueError:
        return host
