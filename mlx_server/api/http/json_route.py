"""How request bodies are read."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import anyio.to_thread
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from mlx_server.api.http.wire import Wire, wire_of
from mlx_server.errors import BadRequest, NotFound

OFF_LOOP_BYTES = 64 * 1024


class JsonRequest(Request):
    """Strict JSON: no NaN, no lone surrogates, bounded nesting."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) > OFF_LOOP_BYTES:
            return await anyio.to_thread.run_sync(_parse, body)
        return _parse(body)


class JsonRoute(APIRoute):
    """Takes JSON of any content type; matches its exact path only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.scope["path"].endswith("\n"):
                # `$` in a path's pattern also matches before a line break.
                raise NotFound("There is nothing at a path that ends with a line break.")
            if "origin" in request.headers and not _declares_json(request):
                # Web pages may post text cross-origin, but JSON only after a preflight.
                raise BadRequest("Content-Type must be application/json for a request of a page.")
            # Without a content type the handler parses JSON.
            headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            return await handler(
                JsonRequest({**request.scope, "headers": headers}, request.receive)
            )

        return handle


def route_of(wire: Wire) -> type[JsonRoute]:
    """Routes for paths that protocols share: taken for the requests of one alone."""

    class SharedPathRoute(JsonRoute):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            return super().matches(scope) if wire_of(scope) is wire else (Match.NONE, {})

    return SharedPathRoute


def _declares_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return request.method == "GET" or kind == "application/json" or kind.endswith("+json")


def _parse(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
