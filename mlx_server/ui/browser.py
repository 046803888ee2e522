"""What the page keeps in its browser: conversations, the key, small choices."""

import json
from typing import Any

import msgspec
from nicegui import Client

from mlx_server.ui.chat.conversation import Conversation

SECONDS = 20.0
"""For an answer of the browser, which may be a phone just woken."""


class Kept(msgspec.Struct):
    """A conversation in the list."""

    id: str
    title: str
    updated: float


class Browser:
    """The storage of one tab's browser. Calls raise TimeoutError if it is gone."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def key(self) -> str:
        return str(await self._ask("key()") or "")

    async def keep_key(self, key: str, for_good: bool) -> None:
        await self._ask(f"keepKey({json.dumps(key)}, {json.dumps(for_good)})")

    async def origin(self) -> str:
        """The address by which it reached the server."""
        return str(await self._ask("origin()"))

    async def choice(self, name: str) -> str:
        return str(await self._ask(f"choice({json.dumps(name)})") or "")

    async def choose(self, name: str, value: str) -> None:
        await self._ask(f"choose({json.dumps(name)}, {json.dumps(value)})")

    async def conversations(self) -> list[Kept]:
        """The latest first."""
        return msgspec.convert(await self._ask("list()"), type=list[Kept])

    async def load(self, id_: str) -> Conversation | None:
        """None if there is none, or an unreadable one."""
        text = await self._ask(f"load({json.dumps(id_)})")
        try:
            return Conversation.from_json(text) if text else None
        except msgspec.MsgspecError:
            return None

    async def save(self, conversation: Conversation) -> bool:
        """Whether it had room."""
        parts = (conversation.id, conversation.title, conversation.to_json())
        return bool(await self._ask(f"save({', '.join(map(json.dumps, parts))})"))

    async def remove(self, id_: str) -> None:
        await self._ask(f"remove({json.dumps(id_)})")

    def run(self, code: str) -> None:
        """Call one of the page's own functions, whatever it answers."""
        self._client.run_javascript(f"mlx.{code}")

    async def _ask(self, code: str) -> Any:
        return await self._client.run_javascript(f"return mlx.{code}", timeout=SECONDS)
