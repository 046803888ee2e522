"""Answers that are bound to a grammar go on as such when their engine dies."""

import asyncio
import json
import os
import signal
from collections import defaultdict
from typing import Any

import httpx
from jsonschema import validate

from tests.faults.conftest import LIVELY, TINY, engine_of
from tests.support.server import CHAT, Server, chat, stream_data, until

ROWS = {
    "type": "array",
    "minItems": 8,
    "maxItems": 12,
    "items": {
        "type": "object",
        "properties": {"id": {"type": "integer"}, "name": {"type": "string", "maxLength": 6}},
        "required": ["id", "name"],
        "additionalProperties": False,
    },
}
TABLE = {
    "type": "object",
    "properties": {"rows": ROWS},
    "required": ["rows"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "save_table", "parameters": TABLE}}


class Streamed:
    """A stream as it comes: its text, and its tool calls' names and arguments."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, dict[str, str]] = defaultdict(lambda: {"name": "", "arguments": ""})
        self.reason: str | None = None
        self.pieces = 0

    def take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            delta = choice["delta"]
            self.text += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                for key, value in call["function"].items():
                    self.calls[call["index"]][key] += value
            self.reason = choice["finish_reason"] or self.reason
            self.pieces += 1

    @property
    def document(self) -> Any:
        """What the grammar was about: the whole text, or the one call's arguments."""
        if self.calls:
            [call] = self.calls.values()
            assert call["name"] == "save_table"
            return json.loads(call["arguments"])
        return json.loads(self.text)


def bound(seed: int) -> dict[str, Any]:
    """A request that is bound to a schema, or for each second seed to a call."""
    sampling = {"temperature": 1, "seed": seed, "max_tokens": 2000, "stream": True}
    if seed % 2:
        more: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required"}
        more["parallel_tool_calls"] = False
    else:
        described = {"name": "table", "schema": TABLE}
        more = {"response_format": {"type": "json_schema", "json_schema": described}}
    return chat(TINY, **sampling, **more)


async def read(client: httpx.AsyncClient, body: dict[str, Any], into: Streamed) -> Streamed:
    async with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for data in stream_data(response):
            if data != "[DONE]":
                into.take(json.loads(data))
    return into


async def test_documents_and_calls_are_whole_and_valid_after_their_engine_was_killed(
    mortal: Server,
) -> None:
    bodies = [bound(seed) for seed in range(4)]
    async with mortal.client(timeout=120) as client:
        undisturbed = await asyncio.gather(*(read(client, body, Streamed()) for body in bodies))
        streams = [Streamed() for _ in bodies]
        pairs = zip(bodies, streams, strict=True)
        tasks = [asyncio.create_task(read(client, body, stream)) for body, stream in pairs]
        pid = None
        for kill in range(1, 3):
            pid = await engine_of(mortal, TINY, pid)

            async def far_enough(pieces: int = 30 * kill) -> bool:
                return all(s.pieces > pieces or s.reason for s in streams)

            await until(far_enough, LIVELY)
            os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
    for stream, before in zip(streams, undisturbed, strict=True):
        validate(stream.document, TABLE)
        assert stream.reason == before.reason
    same = sum(s.document == b.document for s, b in zip(streams, undisturbed, strict=True))
    print(f"{same} of {len(streams)} documents are those of an undisturbed engine")
    assert same >= len(streams) - 1
