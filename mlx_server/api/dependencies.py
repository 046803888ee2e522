"""What routes ask for: the application's parts, and who is calling."""

import hmac
from typing import Annotated, cast

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from mlx_server.config import Settings
from mlx_server.errors import Unauthorized
from mlx_server.models.catalog import Catalog
from mlx_server.models.pool import ModelPoolManager
from mlx_server.schemas.internal import Caller
from mlx_server.services.inference import InferenceService
from mlx_server.telemetry import Metrics


# These are coroutines because FastAPI would call plain functions in a thread each.
async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _catalog(request: Request) -> Catalog:
    return cast(Catalog, request.app.state.catalog)


async def _pool(request: Request) -> ModelPoolManager:
    return cast(ModelPoolManager, request.app.state.pool)


async def _service(request: Request) -> InferenceService:
    return cast(InferenceService, request.app.state.service)


async def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


SettingsDep = Annotated[Settings, Depends(_settings)]
CatalogDep = Annotated[Catalog, Depends(_catalog)]
PoolDep = Annotated[ModelPoolManager, Depends(_pool)]
ServiceDep = Annotated[InferenceService, Depends(_service)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
ApiKey = Annotated[str | None, Depends(APIKeyHeader(name="x-api-key", auto_error=False))]


async def authenticated(
    request: Request, settings: SettingsDep, bearer: Bearer, api_key: ApiKey
) -> Caller:
    """Who is calling. Raises Unauthorized without one of the keys, if there are any."""
    name = _key_name(settings, bearer.credentials if bearer else api_key)
    request.state.key = name or None
    return Caller(request_id=request.state.request_id, key=name)


CallerDep = Annotated[Caller, Depends(authenticated)]


def _key_name(settings: Settings, shown: str | None) -> str:
    """The name under which the shown key is known; empty on an open server."""
    if not settings.api_keys:
        return ""
    if not shown:
        raise Unauthorized("No API key was given: send `Authorization: Bearer <key>`.")
    # Headers arrive as Latin-1. Every key is compared, so that time tells nothing.
    presented = shown.encode("latin-1", "replace")
    matches = [
        hmac.compare_digest(presented, key.get_secret_value().encode()) for key in settings.api_keys
    ]
    if not any(matches):
        raise Unauthorized("The API key is not known to this server.")
    return f"key-{matches.index(True)}"
