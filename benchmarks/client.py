"""The load generator: a process of its own, so that it shares no interpreter with a server.

Reads a `ClientTask` on its standard input and writes the answers' times to its standard output.
A bare HTTP/1.1 client over asyncio streams, to leave the machine's cores to the servers.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from benchmarks.measures import Answer, ClientTask, Endpoint, Job

_WARM_UP_TOKENS = 4
_LINE_LIMIT = 1 << 20


async def answers_to(task: ClientTask) -> list[Answer]:
    """Runs the warm-up, then the job; the answers in no particular order."""
    await _run(task.endpoint, task.job, task.job.warm_up, _WARM_UP_TOKENS)
    return await _run(task.endpoint, task.job, task.job.prompts, task.job.max_tokens)


async def _run(
    endpoint: Endpoint, job: Job, prompts: Sequence[str], max_tokens: int
) -> list[Answer]:
    waiting = list(reversed(prompts))
    answers: list[Answer] = []
    start = time.perf_counter()

    async def stream() -> None:
        while waiting:
            body = _body(endpoint.model, waiting.pop(), max_tokens, job)
            answers.append(await _ask(endpoint, body, lambda: time.perf_counter() - start))

    async with asyncio.TaskGroup() as group:
        for _ in range(job.streams):
            group.create_task(stream())
    return answers


def _body(model: str, prompt: str, max_tokens: int, job: Job) -> bytes:
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": job.temperature,
            "top_p": job.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def _ask(endpoint: Endpoint, body: bytes, now: Callable[[], float]) -> Answer:
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, limit=_LINE_LIMIT)
    try:
        sent = now()
        writer.write(_head(endpoint, len(body)) + body)
        arrivals: list[float] = []
        usage: dict[str, Any] | None = None
        async for event in _events(reader):
            if _has_text(event):
                arrivals.append(now())
            usage = event.get("usage") or usage
        ended = now()
    finally:
        writer.close()
    if usage is None:
        raise RuntimeError("the stream ended without usage")
    return Answer(
        sent, arrivals, ended, int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    )


def _head(endpoint: Endpoint, length: int) -> bytes:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: {endpoint.host}:{endpoint.port}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {length}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()


def _has_text(event: dict[str, Any]) -> bool:
    """Whether the chunk carries text; the first one of OpenAI's carries only the role."""
    return any(
        delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        for delta in (choice["delta"] for choice in event["choices"])
    )


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every server-sent event up to `[DONE]`."""
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


def main() -> None:
    """Entry point of the client process."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=ClientTask)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(answers_to(task))))


if __name__ == "__main__":
    main()
