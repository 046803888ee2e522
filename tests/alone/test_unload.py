"""Unloading the demo model gives its memory back to the system."""

import time
from pathlib import Path

import psutil

from tests.support.demo import MODEL
from tests.support.server import CHAT, Server, ask, chat, serving

SECONDS = 2.0
LEFT_OVER = 50 * 1024 * 1024
"""What front and text process may have grown by in bytes."""


def resident(server: Server) -> int:
    """Bytes of the whole process tree."""
    front = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (front, *server.children()))


async def test_unloading_returns_the_memory_within_two_seconds(
    demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(demo_model.parent, target_is_directory=True)
    with serving(tmp_path) as server:
        async with server.client() as client:
            body = chat(MODEL, max_tokens=8)
            await ask(client, CHAT, body)
            await client.post(f"/admin/models/{MODEL}/unload")
            before = resident(server)
            await ask(client, CHAT, body)
            loaded = resident(server)
            began = time.monotonic()
            answer = await client.post(f"/admin/models/{MODEL}/unload")
            took = time.monotonic() - began
            after = resident(server)
        assert answer.json()["state"] == "absent"
        assert not server.engines()
    print(f"{before:,} → {loaded:,} → {after:,} bytes, unloaded in {took:.2f} s")
    assert took < SECONDS
    assert loaded - before > 500_000_000, "its weights in float32"
    assert after - before < LEFT_OVER
