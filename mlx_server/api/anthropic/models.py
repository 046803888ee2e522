"""`GET /v1/models` in Anthropic's shape, for requests with its version header."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

from fastapi import APIRouter, Depends
from starlette.responses import Response

from mlx_server.api.anthropic.wire import WIRE
from mlx_server.api.http.dependencies import CatalogDep, SettingsDep, authenticated
from mlx_server.api.http.json_route import route_of
from mlx_server.config import Settings
from mlx_server.errors import BadRequest
from mlx_server.models.store.capabilities import FileCapabilities, read_capabilities
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.store.patterns import is_pattern
from mlx_server.schemas.anthropic.models import (
    Capabilities,
    EffortSupport,
    Limit,
    ModelInfo,
    ModelPage,
    ServerToolsSupport,
    Support,
    ThinkingSupport,
    ThinkingTypes,
)

Named = tuple[str, ModelEntry]

# The description can tell of one protocol at a path.
router = APIRouter(
    prefix="/v1/models",
    dependencies=[Depends(authenticated)],
    route_class=route_of(WIRE),
    include_in_schema=False,
)


@router.get("", response_model=ModelPage)
async def list_models(
    catalog: CatalogDep,
    settings: SettingsDep,
    limit: Limit = 20,
    after_id: str | None = None,
    before_id: str | None = None,
) -> Response:
    """A page of the models that can be served, by all their names."""

    def listed() -> bytes:
        names = [named for entry in catalog.entries() for named in _names(entry)]
        chosen, more = page(names, limit, after_id, before_id)
        data = [_info(name, entry, settings) for name, entry in chosen]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return ModelPage(data=data, has_more=more, first_id=first, last_id=last).to_json()

    return Response(await asyncio.to_thread(listed), media_type="application/json")


@router.get("/{model_id:path}", response_model=ModelInfo)
async def get_model(model_id: str, catalog: CatalogDep, settings: SettingsDep) -> Response:
    """One model, by id or alias."""

    def found() -> bytes:
        entry = catalog.find(model_id)
        return _info(entry.id, entry, settings).to_json()

    return Response(await asyncio.to_thread(found), media_type="application/json")


def _names(entry: ModelEntry) -> list[Named]:
    # Programs list only models whose names they know, so aliases matter; a pattern is no name.
    aliases = (alias for alias in entry.aliases if not is_pattern(alias))
    return [(name, entry) for name in (entry.id, *aliases)]


def page(
    names: Sequence[Named], limit: int, after_id: str | None, before_id: str | None
) -> tuple[Sequence[Named], bool]:
    """Those behind `after_id`, or right before `before_id`, and whether more follow there. Raises
    BadRequest for an id that is not listed.
    """
    if after_id is not None and before_id is not None:
        raise BadRequest("Give one of `after_id` and `before_id`.", param="before_id")
    if before_id is not None:
        left = names[: _place(names, before_id, "before_id")]
        return left[max(0, len(left) - limit) :], len(left) > limit
    start = 0 if after_id is None else _place(names, after_id, "after_id") + 1
    left = names[start:]
    return left[:limit], len(left) > limit


def _place(names: Sequence[Named], model_id: str, param: str) -> int:
    for index, (name, _) in enumerate(names):
        if name == model_id:
            return index
    raise BadRequest(f"`{param}` is not in the list of models.", param=param)


def _info(name: str, entry: ModelEntry, settings: Settings) -> ModelInfo:
    context = entry.context_within(settings.context_length)
    created = datetime.fromtimestamp(entry.created, UTC)
    found = read_capabilities(entry)
    return ModelInfo(
        type="model",
        id=name,
        display_name=entry.id,
        created_at=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        lifecycle="active",
        max_input_tokens=context,
        max_tokens=context,
        capabilities=None if found is None else _capabilities(found),
    )


def _capabilities(found: FileCapabilities) -> Capabilities:
    yes, no = Support(supported=True), Support(supported=False)
    thinks = yes if found.reasoning else no
    return Capabilities(
        batch=no,
        citations=no,
        code_execution=no,
        context_management=no,
        effort=EffortSupport(
            supported=found.reasoning, low=thinks, medium=thinks, high=thinks, xhigh=no, max=no
        ),
        image_input=no,
        pdf_input=no,
        server_tools=ServerToolsSupport(supported=False, code_execution=no, web_search=no),
        structured_outputs=yes if found.structured_output else no,
        thinking=ThinkingSupport(
            supported=found.reasoning,
            types=ThinkingTypes(adaptive=thinks, between_tools=yes, disabled=yes, enabled=thinks),
        ),
    )
