"""Streams' bytes: what comes, and in which order."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from starlette.types import Message

from mlx_server.api.http.streaming import _EventStream, _Frames, _never
from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.openai.responses.wire import WIRE
from mlx_server.config import Settings


async def test_events_and_pings_amid_them_come_in_the_order_of_their_numbers() -> None:
    draw = random.Random(1)
    app = SimpleNamespace(state=SimpleNamespace(settings=Settings(ping_interval=0.001)))
    state = {"wire": WIRE, "request_id": "r"}
    scope: Any = {"type": "http", "method": "POST", "app": app, "state": state}
    frames = _Frames(scope, lambda: StreamEvent(b'{"type":"idle"}'))
    sent: list[bytes] = []

    async def wait() -> None:
        for _ in range(draw.randrange(20)):
            await asyncio.sleep(0)

    async def events() -> AsyncIterator[bytes]:
        for _ in range(2000):
            yield frames.join([StreamEvent(b'{"type":"said"}')])
            await wait()

    async def send(message: Message) -> None:
        await wait()  # as for a client that reads slowly
        sent.append(message.get("body", b""))

    await _EventStream(events(), frames)(scope, _never, send)
    told = b"".join(sent)
    numbers = [int(one) for one in re.findall(rb'"sequence_number":(\d+)', told)]
    assert told.count(b"idle") > 3
    assert numbers == list(range(len(numbers)))
