"""The load generator: streams answers from servers and notes when text comes.

A bare HTTP/1.1 client over asyncio streams, to leave the machine's cores to the servers, which run
in processes of their own.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

from benchmarks.dialects import CHAT, Dialect, Message, Tokens

GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0}

T = TypeVar("T")

_LINE_LIMIT = 1 << 20
_TIMEOUT = 2 * 3600.0


class Endpoint(msgspec.Struct, frozen=True):
    """Where requests are sent, and for which model."""

    host: str
    port: int
    model: str


@dataclass(frozen=True)
class Request:
    """One answer to a conversation; `options` are further fields of its body."""

    messages: Sequence[Message]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=lambda: GREEDY)
    dialect: Dialect = CHAT


@dataclass(frozen=True)
class Answer:
    """One streamed answer. Times are those of `time.perf_counter`, in seconds."""

    sent: float
    arrivals: Sequence[float]
    """When each piece of text came; there is at least one."""
    ended: float
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def ttft(self) -> float:
        """Seconds from the request to the first text."""
        return self.arrivals[0] - self.sent

    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        return [after - before for before, after in pairwise(self.arrivals)]


def user(text: str) -> Message:
    """What a user says."""
    return {"role": "user", "content": text}


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` in an event loop of its own."""
    return asyncio.run(asyncio.wait_for(work, _TIMEOUT))


async def ask_all(
    endpoint: Endpoint, requests: Sequence[Request], streams: int | None = None
) -> list[Answer]:
    """The answers in no particular order, `streams` requests at a time; all at once if unset."""
    waiting = list(reversed(requests))
    answers: list[Answer] = []

    async def stream() -> None:
        while waiting:
            answers.append(await ask(endpoint, waiting.pop()))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams or len(requests)):
            group.create_task(stream())
    return answers


async def ask(
    endpoint: Endpoint, request: Request, note: Callable[[int], None] = lambda count: None
) -> Answer:
    """One answer; `note` is called with the number of pieces whenever a piece of text came."""
    dialect = request.dialect
    asked = dialect.body(request.messages, request.max_tokens)
    body = msgspec.json.encode({"model": endpoint.model} | asked | request.options)
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, limit=_LINE_LIMIT)
    arrivals: list[float] = []
    pieces: list[str] = []
    tokens: Tokens | None = None
    try:
        sent = time.perf_counter()
        writer.write(_head(endpoint, dialect.path, len(body)) + body)
        async for event in _events(reader):
            if text := dialect.text(event):
                arrivals.append(time.perf_counter())
                pieces.append(text)
                note(len(pieces))
            tokens = dialect.tokens(event) or tokens
        ended = time.perf_counter()
    finally:
        writer.close()
    if not arrivals or tokens is None:
        raise RuntimeError("the stream ended without text or without usage")
    return Answer(
        sent=sent,
        arrivals=arrivals,
        ended=ended,
        text="".join(pieces),
        prompt_tokens=tokens.prompt,
        completion_tokens=tokens.completion,
        cached_tokens=tokens.cached,
    )


def _head(endpoint: Endpoint, path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\n"
        f"Host: {endpoint.host}:{endpoint.port}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {length}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every server-sent event but `[DONE]`."""
    status, chunked = await _response_head(reader)
    if status != 200:
        raise RuntimeError(f"status {status}: {(await reader.read(2000)).decode(errors='replace')}")
    pending = b""
    async for piece in _chunks(reader) if chunked else _pieces(reader):
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(f"error in the stream: {event['error']}")
            yield event


async def _response_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the body comes in HTTP chunks (else it ends with the connection)."""
    status = int((await reader.readline()).split()[1])
    chunked = False
    while line := (await reader.readline()).strip().lower():
        chunked = chunked or (line.startswith(b"transfer-encoding:") and b"chunked" in line)
    return status, chunked


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(_LINE_LIMIT):
        yield piece
