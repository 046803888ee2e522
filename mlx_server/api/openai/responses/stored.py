"""Stored responses: get, delete, cancel and list what they answered."""

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.openai.responses.history import OwnerDep, PagingDep, RecordsDep, page
from mlx_server.api.openai.wire import documented
from mlx_server.errors import BadRequest
from mlx_server.schemas.openai.responses.answers import ItemList, ResponseBody, ResponseDeleted

router = APIRouter(prefix="/v1", route_class=JsonRoute)
ERRORS = documented(400, 401, 403, 404, 413, 503)
JSON = "application/json"


@router.get("/responses/{response_id}", response_model=ResponseBody, responses=ERRORS)
async def get_response(
    response_id: str, owner: OwnerDep, records: RecordsDep, stream: bool = False
) -> Response:
    """A stored response."""
    if stream:
        raise BadRequest("A stored response is not streamed again.", param="stream")
    found = await records.find(owner, response_id, "response")
    return Response(found.body, media_type=JSON)


@router.delete("/responses/{response_id}", response_model=ResponseDeleted, responses=ERRORS)
async def delete_response(response_id: str, owner: OwnerDep, records: RecordsDep) -> Response:
    """Delete a stored response: nothing can go on from it any more."""
    await records.delete(owner, response_id, "response")
    answer = ResponseDeleted(id=response_id, object="response", deleted=True)
    return Response(answer.to_json(), media_type=JSON)


@router.post("/responses/{response_id}/cancel", response_model=ResponseBody, responses=ERRORS)
async def cancel_response(response_id: str, owner: OwnerDep, records: RecordsDep) -> Response:
    """Only responses in the background could be cancelled, and there are none."""
    await records.find(owner, response_id, "response")
    raise BadRequest(
        "Only a response that was made with `background: true` can be cancelled; to stop another, "
        "close its connection."
    )


@router.get("/responses/{response_id}/input_items", response_model=ItemList, responses=ERRORS)
async def list_input_items(
    response_id: str,
    owner: OwnerDep,
    records: RecordsDep,
    paging: PagingDep,
) -> Response:
    """What a response answered, the newest first unless asked otherwise."""
    items = await records.items(owner, response_id, "response")
    asked = [item for item in items if not item.output]
    return Response(page(asked, paging), media_type=JSON)
