"""`GET /v1/models`: every model that can be served."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict

from fastapi import APIRouter, Depends
from starlette.responses import Response

from mlx_server.api.http.dependencies import CatalogDep, PoolDep, SettingsDep, authenticated
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.openai.wire import documented
from mlx_server.config import Settings
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.store.capabilities import read_capabilities
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.generation import own_sampling
from mlx_server.schemas.openai.models import Model, ModelCapabilities, ModelList, ModelSampling

router = APIRouter(prefix="/v1", dependencies=[Depends(authenticated)], route_class=JsonRoute)


@router.get("/models", response_model=ModelList, responses=documented(400, 401, 403, 413))
async def list_models(catalog: CatalogDep, pool: PoolDep, settings: SettingsDep) -> Response:
    """Every model that can be served, loaded or not."""
    states = _states(pool)

    def listed() -> bytes:
        models = [_model(entry, states, settings) for entry in catalog.entries()]
        return ModelList(object="list", data=models).to_json()

    return Response(await asyncio.to_thread(listed), media_type="application/json")


@router.get(
    "/models/{model_id:path}",
    response_model=Model,
    responses=documented(400, 401, 403, 404, 413),
)
async def get_model(
    model_id: str, catalog: CatalogDep, pool: PoolDep, settings: SettingsDep
) -> Response:
    """One model, by id or alias."""
    states = _states(pool)

    def found() -> bytes:
        return _model(catalog.find(model_id), states, settings).to_json()

    return Response(await asyncio.to_thread(found), media_type="application/json")


def _states(pool: ModelPoolManager) -> dict[str, str]:
    return {status.id: status.state for status in pool.statuses()}


def _model(entry: ModelEntry, states: Mapping[str, str], settings: Settings) -> Model:
    own = own_sampling(entry.path) if entry.path and settings.model_sampling else {}
    return Model(
        id=entry.id,
        object="model",
        created=entry.created,
        owned_by="mlx-server",
        state=states.get(entry.id, "absent"),
        size=entry.size,
        context_length=entry.context_within(settings.context_length),
        model_type=entry.model_type,
        aliases=list(entry.aliases),
        default_sampling=ModelSampling.model_validate(own),
        capabilities=_capabilities(entry),
    )


def _capabilities(entry: ModelEntry) -> ModelCapabilities | None:
    found = read_capabilities(entry)
    return None if found is None else ModelCapabilities(**asdict(found))
