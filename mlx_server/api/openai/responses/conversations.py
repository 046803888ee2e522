"""`/v1/conversations`: conversations that responses go on from and add to."""

import time
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.openai.responses.history import (
    OwnerDep,
    PagingDep,
    RecordsDep,
    kept,
    listed,
    page,
)
from mlx_server.api.openai.wire import documented
from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.responses.answers import Conversation, ConversationDeleted, ItemList
from mlx_server.schemas.openai.responses.items import Item
from mlx_server.schemas.openai.responses.requests import (
    ConversationChange,
    NewConversation,
    NewItems,
)
from mlx_server.services.records import KeptItem, Record, RecordNotFound

router = APIRouter(prefix="/v1/conversations", route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 503)
JSON = "application/json"


@router.post("", response_model=Conversation, responses=ERRORS)
async def create_conversation(
    body: NewConversation, owner: OwnerDep, records: RecordsDep
) -> Response:
    """Begin a conversation."""
    conversation = Conversation(
        id=f"conv_{uuid4().hex}",
        object="conversation",
        created_at=int(time.time()),
        metadata=body.metadata,
    )
    record = Record(conversation.id, "conversation", conversation.to_json())
    await records.keep(owner, record, _new(body.items))
    return Response(record.body, media_type=JSON)


@router.get("/{conversation_id}", response_model=Conversation, responses=ERRORS)
async def get_conversation(conversation_id: str, owner: OwnerDep, records: RecordsDep) -> Response:
    """A conversation, without its items."""
    found = await records.find(owner, conversation_id, "conversation")
    return Response(found.body, media_type=JSON)


@router.post("/{conversation_id}", response_model=Conversation, responses=ERRORS)
async def update_conversation(
    conversation_id: str, body: ConversationChange, owner: OwnerDep, records: RecordsDep
) -> Response:
    """Replace a conversation's metadata."""
    found = await records.find(owner, conversation_id, "conversation")
    conversation = Conversation.model_validate_json(found.body)
    conversation.metadata = body.metadata
    changed = Record(conversation_id, "conversation", conversation.to_json())
    await records.change(owner, changed)
    return Response(changed.body, media_type=JSON)


@router.delete("/{conversation_id}", response_model=ConversationDeleted, responses=ERRORS)
async def delete_conversation(
    conversation_id: str, owner: OwnerDep, records: RecordsDep
) -> Response:
    """Delete a conversation with its items."""
    await records.delete(owner, conversation_id, "conversation")
    answer = ConversationDeleted(id=conversation_id, object="conversation.deleted", deleted=True)
    return Response(answer.to_json(), media_type=JSON)


@router.post("/{conversation_id}/items", response_model=ItemList, responses=ERRORS)
async def add_items(
    conversation_id: str, body: NewItems, owner: OwnerDep, records: RecordsDep
) -> Response:
    """Add items to a conversation's end."""
    items = _new(body.items)
    await records.append(owner, conversation_id, items)
    return Response(listed(items), media_type=JSON)


@router.get("/{conversation_id}/items", response_model=ItemList, responses=ERRORS)
async def list_items(
    conversation_id: str,
    owner: OwnerDep,
    records: RecordsDep,
    paging: PagingDep,
) -> Response:
    """A conversation's items, the newest first unless asked otherwise."""
    items = await records.items(owner, conversation_id, "conversation")
    return Response(page(items, paging), media_type=JSON)


@router.get(
    "/{conversation_id}/items/{item_id}", response_model=dict[str, object], responses=ERRORS
)
async def get_item(
    conversation_id: str, item_id: str, owner: OwnerDep, records: RecordsDep
) -> Response:
    """One item of a conversation."""
    for item in await records.items(owner, conversation_id, "conversation"):
        if item.id == item_id:
            return Response(item.body, media_type=JSON)
    raise RecordNotFound(f"There is no item '{item_id[:128]}' in this conversation.")


@router.delete("/{conversation_id}/items/{item_id}", response_model=Conversation, responses=ERRORS)
async def delete_item(
    conversation_id: str, item_id: str, owner: OwnerDep, records: RecordsDep
) -> Response:
    """Delete one item of a conversation."""
    await records.delete_item(owner, conversation_id, item_id)
    return await get_conversation(conversation_id, owner, records)


def _new(items: list[Item]) -> list[KeptItem]:
    """Raises BadRequest for references, which would be to themselves."""
    if any(item.type == "item_reference" for item in items):
        raise BadRequest("Items that are added cannot be references.", param="items")
    return kept(items)
