"""What routes ask for: the application's parts, and who is calling."""

import hmac
from collections.abc import Sequence
from typing import Annotated, cast

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.requests import Request

from mlx_server.config import Settings
from mlx_server.errors import Forbidden, Unauthorized
from mlx_server.models.catalog import Catalog
from mlx_server.models.pool import ModelPoolManager
from mlx_server.models.pulls import PullManager
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


async def _pulls(request: Request) -> PullManager:
    return cast(PullManager, request.app.state.pulls)


async def _service(request: Request) -> InferenceService:
    return cast(InferenceService, request.app.state.service)


async def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


SettingsDep = Annotated[Settings, Depends(_settings)]
CatalogDep = Annotated[Catalog, Depends(_catalog)]
PoolDep = Annotated[ModelPoolManager, Depends(_pool)]
PullsDep = Annotated[PullManager, Depends(_pulls)]
ServiceDep = Annotated[InferenceService, Depends(_service)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
ApiKey = Annotated[str | None, Depends(APIKeyHeader(name="x-api-key", auto_error=False))]


async def authenticated(
    request: Request, settings: SettingsDep, bearer: Bearer, api_key: ApiKey
) -> Caller:
    """Who is calling. Raises Unauthorized without one of the keys, if there are any."""
    name = _caller_name(settings, bearer.credentials if bearer else api_key)
    request.state.key = name or None
    return Caller(request_id=request.state.request_id, key=name)


async def administrator(
    request: Request, settings: SettingsDep, bearer: Bearer, api_key: ApiKey
) -> Caller:
    """Who is calling, where only an admin key counts; if there are none, any key does.

    Raises Forbidden for a caller whose key is good for the rest of the API alone.
    """
    if not settings.admin_keys:
        return await authenticated(request, settings, bearer, api_key)
    name = _key_name(settings, bearer.credentials if bearer else api_key)
    if not name.startswith(ADMIN):
        raise Forbidden("This API key is not one for administrators.")
    request.state.key = name
    return Caller(request_id=request.state.request_id, key=name)


CallerDep = Annotated[Caller, Depends(authenticated)]
AdminDep = Depends(administrator)

ADMIN = "admin-"


def _caller_name(settings: Settings, shown: str | None) -> str:
    """The name under which the shown key is known; empty on an open server."""
    return _key_name(settings, shown) if settings.api_keys else ""


def _key_name(settings: Settings, shown: str | None) -> str:
    if not shown:
        raise Unauthorized("No API key was given: send `Authorization: Bearer <key>`.")
    # Every key is compared, so that time tells nothing.
    admin = _matches(settings.admin_keys, shown)
    others = _matches(settings.api_keys, shown)
    if any(admin):
        return f"{ADMIN}{admin.index(True)}"
    if any(others):
        return f"key-{others.index(True)}"
    raise Unauthorized("The API key is not known to this server.")


def _matches(keys: Sequence[SecretStr], shown: str) -> list[bool]:
    # Headers arrive as Latin-1.
    presented = shown.encode("latin-1", "replace")
    return [hmac.compare_digest(presented, key.get_secret_value().encode()) for key in keys]
