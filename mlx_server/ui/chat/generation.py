"""An answer while it comes: chunks become a message, with what it took."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from mlx_server.ui.api import Api, ApiError
from mlx_server.ui.chat.conversation import Call, Message

LOADING = "model_loading"
SHOWN_SECONDS = 0.1
"""Least time between two looks of an answer that grows."""
SHARE = 0.1
"""Of its time that a process may spend on showing one answer."""


class Answering:
    """Fills `message` from the chunks of `body`'s answer, and has it shown now and then."""

    def __init__(self, message: Message, show: Callable[[], None]) -> None:
        self.message = message
        self._show = show
        self._began = time.perf_counter()
        self._first: float | None = None
        self._thought: float | None = None
        self._next_look = 0.0

    async def run(self, api: Api, body: dict[str, Any]) -> None:
        """Errors become the message's. Cancelled, it keeps what has come."""
        try:
            while not await self._tried(api, body):
                pass
        except ApiError as error:
            self.message.error = str(error)
        except BaseException:
            self.message.finish = "stopped"
            raise
        finally:
            self._close()

    async def _tried(self, api: Api, body: dict[str, Any]) -> bool:
        """False if the model was still loading: the server lets nobody wait for long."""
        try:
            await self._read(api.chat(body))
        except ApiError as error:
            if error.code != LOADING:
                raise
            return False
        return True

    async def _read(self, chunks: AsyncIterator[dict[str, Any]]) -> None:
        async for chunk in chunks:
            for choice in chunk.get("choices", ()):
                self._take(choice["delta"])
                self.message.finish = choice.get("finish_reason") or self.message.finish
            if usage := chunk.get("usage"):
                self._count(usage)
            self._look()

    def _take(self, delta: dict[str, Any]) -> None:
        message, now = self.message, time.perf_counter()
        said = delta.get("content")
        thought = delta.get("reasoning_content")
        calls = delta.get("tool_calls") or ()
        if self._first is None and (said or thought or calls):
            self._first = now
            message.first_seconds = now - self._began
        if thought:
            message.reasoning += thought
            self._thought = now
        if self._thought is not None and self._first is not None:
            message.thought_seconds = self._thought - self._first
        message.content += said or ""
        for piece in calls:
            self._take_call(piece)

    def _take_call(self, piece: dict[str, Any]) -> None:
        calls = self.message.calls
        function = piece["function"]
        if piece["index"] >= len(calls):
            calls.append(Call(piece.get("id") or "", function.get("name") or ""))
        calls[piece["index"]].arguments += function.get("arguments") or ""

    def _count(self, usage: dict[str, Any]) -> None:
        message = self.message
        message.tokens = usage["completion_tokens"]
        message.prompt_tokens = usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        message.cached_tokens = details.get("cached_tokens") or 0

    def _close(self) -> None:
        """The first token is there when the clock starts, so one fewer is counted."""
        if self._first is not None and self.message.tokens > 1:
            seconds = time.perf_counter() - self._first
            self.message.tokens_per_second = (self.message.tokens - 1) / max(seconds, 1e-6)
        self._show()

    def _look(self) -> None:
        now = time.perf_counter()
        if now < self._next_look:
            return
        self._show()
        took = time.perf_counter() - now
        self._next_look = now + max(SHOWN_SECONDS, took / SHARE)
