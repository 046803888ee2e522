"""What models there are: `/api/tags`, `/api/show`, `/api/ps`, `/api/version`."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime

from fastapi import APIRouter, Depends
from starlette.responses import PlainTextResponse, Response

from mlx_server.api.http.dependencies import CatalogDep, PoolDep, SettingsDep, authenticated
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.ollama.answers import moment
from mlx_server.api.ollama.description import Description
from mlx_server.api.ollama.wire import documented
from mlx_server.models.pool.status import ModelStatus
from mlx_server.models.store.catalog import LATEST, Catalog, ModelEntry
from mlx_server.models.store.patterns import is_pattern
from mlx_server.schemas.ollama.models import (
    LocalModel,
    LocalModels,
    ModelShow,
    RunningModel,
    RunningModels,
    ShowResponse,
    Version,
)
from mlx_server.services.residence import HELD

API_VERSION = "0.33.0"
"""Of Ollama, whose API this is. Clients ask for a least one, and read each part as a number."""
FOR_EVER = datetime(2318, 1, 1, tzinfo=UTC)

probe = APIRouter(include_in_schema=False)
router = APIRouter(
    prefix="/api",
    dependencies=[Depends(authenticated)],
    route_class=JsonRoute,
    strict_content_type=False,
)


@probe.get("/")
async def root() -> PlainTextResponse:
    """What programs look for that want to know whether an Ollama is there."""
    return PlainTextResponse("Ollama is running")


@router.get("/version", response_model=Version, responses=documented(400, 401, 403, 413))
async def version() -> Response:
    """The version of Ollama's API that is spoken here."""
    return Response(Version(version=API_VERSION).to_json(), media_type="application/json")


@router.get("/tags", response_model=LocalModels, responses=documented(400, 401, 403, 413))
async def tags(catalog: CatalogDep, settings: SettingsDep) -> Response:
    """Every model that can be served, by each of its names."""

    def listed() -> bytes:
        entries = catalog.entries()
        models = [
            _model(name, Description(entry, settings.context_length))
            for entry in entries
            for name in _names(entry)
        ]
        return LocalModels(models=models).to_json()

    return Response(await asyncio.to_thread(listed), media_type="application/json")


@router.post("/show", response_model=ShowResponse, responses=documented(400, 401, 403, 404, 413))
async def show(body: ModelShow, catalog: CatalogDep, settings: SettingsDep) -> Response:
    """One model's capabilities, sizes and template."""

    def found() -> bytes:
        entry = catalog.find(body.model)
        own = settings.model_sampling
        return _shown(Description(entry, settings.context_length), own_sampling=own).to_json()

    return Response(await asyncio.to_thread(found), media_type="application/json")


@router.get("/ps", response_model=RunningModels, responses=documented(400, 401, 403, 413))
async def running(catalog: CatalogDep, pool: PoolDep, settings: SettingsDep) -> Response:
    """The models in memory."""
    held = [status for status in pool.statuses() if status.state in HELD]

    def listed() -> bytes:
        models = list(_running(held, catalog, settings.context_length))
        return RunningModels(models=models).to_json()

    return Response(await asyncio.to_thread(listed), media_type="application/json")


def tagged(name: str) -> str:
    return name if name.endswith(LATEST) else name + LATEST


def _names(entry: ModelEntry) -> list[str]:
    names = (entry.id, *(alias for alias in entry.aliases if not is_pattern(alias)))
    return list(dict.fromkeys(tagged(name) for name in names))


def _model(name: str, described: Description) -> LocalModel:
    return LocalModel(
        name=name,
        model=name,
        modified_at=described.modified_at,
        size=described.entry.size,
        digest=described.digest,
        details=described.details(),
        capabilities=described.capabilities(),
        context_length=described.context_length,
    )


def _shown(described: Description, *, own_sampling: bool) -> ShowResponse:
    parameters = described.parameters() if own_sampling else {}
    lines = [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return ShowResponse(
        license="",
        modelfile="\n".join([f"FROM {described.entry.id}", *lines]),
        parameters="\n".join(f"{name:<30} {value}" for name, value in parameters.items()),
        template=described.template(),
        details=described.details(),
        model_info=described.model_info(),
        capabilities=described.capabilities(),
        modified_at=described.modified_at,
    )


def _running(
    held: list[ModelStatus], catalog: Catalog, longest: int | None
) -> Iterator[RunningModel]:
    known = {entry.id: entry for entry in catalog.entries()}
    for status in held:
        if (entry := known.get(status.id)) is None:
            continue
        described = Description(entry, longest)
        size = status.need or 0
        expires = FOR_EVER if status.expires is None else _at(status.expires)
        yield RunningModel(
            name=tagged(entry.id),
            model=tagged(entry.id),
            size=size,
            digest=described.digest,
            details=described.details(),
            expires_at=moment(expires),
            size_vram=0 if status.device == "cpu" else size,
            context_length=status.context_length or described.context_length or 0,
        )


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
