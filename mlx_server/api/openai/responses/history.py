"""What was said before a response, and what is kept of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import msgspec
from fastapi import Depends, Query
from starlette.requests import Request

from mlx_server.api.http.dependencies import authenticated
from mlx_server.api.openai.responses.output import PREFIXES, item_id
from mlx_server.api.openai.responses.thinking import Sealer
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import Caller
from mlx_server.schemas.openai.responses.answers import ItemList, ResponseBody
from mlx_server.schemas.openai.responses.items import Item
from mlx_server.schemas.openai.responses.requests import InputOptions, ResponseRequest
from mlx_server.services.records import KeptItem, Record, RecordNotFound, Records

CALLED_BY_ROLE = {"assistant": "output_text"}
MAX_PAGE = 100


@dataclass(frozen=True, slots=True)
class Paging:
    """Which items of a list are asked for; `after` is an item's id."""

    after: str | None = None
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20
    order: Literal["asc", "desc"] = "desc"


async def _records(request: Request) -> Records:
    return cast(Records, request.app.state.records)


async def _sealer(request: Request) -> Sealer:
    return cast(Sealer, request.app.state.sealer)


async def _owner(request: Request, caller: Annotated[Caller, Depends(authenticated)]) -> str:
    """A key's name; who needs no key shares with all who need none."""
    return cast(str, getattr(request.state, "key", ""))


RecordsDep = Annotated[Records, Depends(_records)]
SealerDep = Annotated[Sealer, Depends(_sealer)]
OwnerDep = Annotated[str, Depends(_owner)]
PagingDep = Annotated[Paging, Depends()]


@dataclass(frozen=True, slots=True)
class History:
    before: list[Item]
    new: list[Item]

    @property
    def items(self) -> list[Item]:
        return [*self.before, *self.new]


async def history(body: InputOptions, owner: str, records: Records) -> History:
    """Raises BadRequest, RecordNotFound and RecordsFailed."""
    if isinstance(body.input, str):
        asked = [Item(role="user", content=body.input)] if body.input else []
    else:
        asked = await _resolved(body.input, owner, records)
    before: Sequence[KeptItem] = []
    if body.previous_response_id is not None:
        try:
            before = await records.said_until(owner, body.previous_response_id)
        except RecordNotFound as error:
            raise BadRequest(
                error.message, param="previous_response_id", code="previous_response_not_found"
            ) from error
    elif body.conversation_id is not None:
        before = await records.items(owner, body.conversation_id, "conversation")
    return History([read(item) for item in before], asked)


def read(item: KeptItem) -> Item:
    return Item.model_validate_json(item.body)


async def _resolved(items: Sequence[Item], owner: str, records: Records) -> list[Item]:
    """With what is referred to in the references' places."""
    wanted = [item.id for item in items if item.type == "item_reference" and item.id]
    if not wanted:
        return list(items)
    try:
        found = await records.find_items(owner, wanted)
    except RecordNotFound as error:
        raise BadRequest(error.message, param="input") from error
    return [read(found[item.id]) if item.id in found else item for item in items]


def kept(items: Iterable[Item]) -> list[KeptItem]:
    """As answers show them; those of hosted tools are left out."""
    shown = [_shown(item) for item in items if item.type in PREFIXES]
    return [KeptItem(item["id"], msgspec.json.encode(item)) for item in shown]


def _shown(item: Item) -> dict[str, Any]:
    told = item.model_dump(exclude_none=True)
    told = {"id": item_id(item.type), "type": item.type} | told
    if item.type == "reasoning":
        return {"summary": []} | told
    if item.type == "message":
        told["content"] = _parts(item)
    if item.type != "custom_tool_call":
        told = told | {"status": "completed"}
    return told


def _parts(item: Item) -> list[dict[str, Any]]:
    kind = CALLED_BY_ROLE.get(item.role or "", "input_text")
    if isinstance(item.content, str):
        parts: list[dict[str, Any]] = [{"type": kind, "text": item.content}]
    else:
        parts = [part.model_dump(exclude_none=True) for part in item.content or ()]
    blank: dict[str, Any] = {"annotations": [], "logprobs": []}
    return [blank | part if part["type"] == "output_text" else part for part in parts]


@dataclass(frozen=True, slots=True)
class Keeper:
    records: Records
    owner: str
    body: ResponseRequest
    new: Sequence[KeptItem]

    async def keep(self, response: ResponseBody) -> None:
        """Raises RecordsFailed; RecordNotFound for a conversation deleted meanwhile."""
        said = [KeptItem(one["id"], msgspec.json.encode(one), True) for one in response.output]
        record = Record(response.id, "response", response.to_json(), self.body.previous_response_id)
        within = self.body.conversation_id
        await self.records.keep(self.owner, record, [*self.new, *said], within)


def page(items: Sequence[KeptItem], asked: Paging) -> bytes:
    """Raises BadRequest."""
    ordered = list(items) if asked.order == "asc" else list(reversed(items))
    if asked.after is not None:
        places = [index for index, item in enumerate(ordered) if item.id == asked.after]
        if not places:
            raise BadRequest(f"There is no item '{asked.after[:128]}' here.", param="after")
        ordered = ordered[places[0] + 1 :]
    return listed(ordered[: asked.limit], has_more=len(ordered) > asked.limit)


def listed(items: Sequence[KeptItem], *, has_more: bool = False) -> bytes:
    return ItemList(
        object="list",
        data=[msgspec.json.decode(item.body) for item in items],
        first_id=items[0].id if items else "",
        last_id=items[-1].id if items else "",
        has_more=has_more,
    ).to_json()
