"""The server as the page sees it: its public and admin APIs, over HTTP."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx2

from mlx_server.events import PAGE_AGENT

CONNECT_SECONDS = 10.0
LONGEST_MESSAGE = 2000


class ApiError(Exception):
    """What the server, or the way to it, had against a request. Status 0: no answer came."""

    def __init__(self, message: str, status: int = 0, code: str | None = None) -> None:
        super().__init__(message[:LONGEST_MESSAGE])
        self.status = status
        self.code = code

    @property
    def needs_key(self) -> bool:
        return self.status in (401, 403)


class Api:
    """Calls with `key`, if there is one. Every call raises ApiError."""

    def __init__(
        self, server: str, key: str = "", client: httpx2.AsyncClient | None = None
    ) -> None:
        self.server = server
        self.key = key
        self._client = client or httpx2.AsyncClient(
            base_url=server,
            headers={"user-agent": PAGE_AGENT},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
        )

    def with_key(self, key: str) -> Self:
        return type(self)(self.server, key, self._client)

    async def close(self) -> None:
        await self._client.aclose()

    # the public API

    async def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self._ask("GET", "/v1/models"))["data"]
        return found

    def chat(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        return self._stream("/v1/chat/completions", body)

    # the admin API

    async def all_models(self) -> Any:
        """With their `memory_budget`."""
        return await self._ask("GET", "/admin/models")

    async def load(self, model: str) -> None:
        await self._ask("POST", f"/admin/models/{quote(model)}/load")

    async def unload(self, model: str) -> None:
        await self._ask("POST", f"/admin/models/{quote(model)}/unload")

    async def pin(self, model: str, pinned: bool) -> None:
        await self._ask("POST", f"/admin/models/{quote(model)}/{'pin' if pinned else 'unpin'}")

    async def remove(self, model: str) -> None:
        await self._ask("DELETE", f"/admin/models/{quote(model)}")

    def pull(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """Progress of a download, which stops when nobody follows it."""
        return self._stream("/admin/models/pull", {"model": model})

    async def requests(self) -> Any:
        return await self._ask("GET", "/admin/requests")

    async def history(self, since: float) -> list[dict[str, Any]]:
        """Samples that were taken after `since`, in seconds since the epoch."""
        found: Any = await self._ask("GET", f"/admin/history?since={since!r}")
        return list(found["samples"])

    # HTTP

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        async with self._sent(method, path, body) as answer:
            return json.loads(await answer.aread())

    async def _stream(self, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
        async with self._sent("POST", path, body) as answer:
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise _error(answer.status_code, data)
                yield event

    @asynccontextmanager
    async def _sent(self, method: str, path: str, body: object) -> AsyncIterator[httpx2.Response]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        asked = self._client.stream(method, path, json=body, headers=headers)
        try:
            async with asked as answer:
                if answer.status_code >= 400:
                    raise _error(answer.status_code, (await answer.aread()).decode())
                yield answer
        except httpx2.HTTPError as error:
            raise ApiError(f"The server did not answer: {error or type(error).__name__}") from error


def _error(status: int, body: str) -> ApiError:
    try:
        error = json.loads(body)["error"]
        return ApiError(str(error["message"]), status, error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ApiError(body, status)
