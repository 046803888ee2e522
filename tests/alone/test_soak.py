"""Hours of what users, accidents and operators do, in minutes."""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_lifecycle import Load
from tests.support.pool import NAMES, need_of, pool, three_models
from tests.support.server import CHAT, TEXT, Server, ask, until

SETTLED = 60.0
GROWTH = 1.03
KILL_EVERY = 100
MOST_THREADS = 1 + min(32, (os.cpu_count() or 1) + 4)
"""The main thread and asyncio's own for blocking work, which come one by one and stay."""
BAD: list[tuple[str, Any]] = [
    (CHAT, {"messages": "none"}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "temperature": -1}),
    (TEXT, {"prompt": [10**9]}),
    (TEXT, {"prompt": "x", "top_p": 7}),
    (TEXT, "this is no object"),
]


@dataclass
class Life(Load):
    """Requests to several models, some dropped, some bad, while engines are killed."""

    sent: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    async def _worker(self, client: httpx.AsyncClient, left: Iterator[int]) -> None:
        for _ in left:
            self.sent += 1
            if self.sent % KILL_EVERY == 0:
                self._kill()
            await self._one(client)

    async def _one(self, client: httpx.AsyncClient) -> None:
        path, body = self._request()
        # In groups, as users come: a swap for every request would measure nothing else.
        body["model"] = NAMES[self.sent // 50 % len(NAMES)]
        match self.random.randrange(8):
            case 0:
                self.kinds["dropped"] += 1
                await self._drop(client, path, body | {"ignore_eos": True, "max_tokens": 400})
            case 1:
                self.kinds["bad"] += 1
                await self._refused(client, body["model"])
            case _:
                answer = await ask(client, path, body)
                assert answer.done
                self.kinds["answered"] += 1

    async def _refused(self, client: httpx.AsyncClient, model: str) -> None:
        path, bad = self.random.choice(BAD)
        body = bad | {"model": model} if isinstance(bad, dict) else bad
        answer = await client.post(path, content=json.dumps(body))
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]

    def _kill(self) -> None:
        for engine in self.server.engines():
            self.kinds["killed"] += 1
            engine.kill()


@dataclass(frozen=True)
class Holdings:
    """What the front holds: bytes resident, file descriptors, threads and tasks."""

    rss: int
    fds: int
    threads: int
    tasks: int

    @classmethod
    async def of(cls, server: Server) -> "Holdings":
        """As soon as nobody holds a connection and every model is idle."""
        front = psutil.Process(server.process.pid)

        async def quiet() -> bool:
            states = (await server.models()).values()
            idle = all(s["running"] == s["waiting"] == s["in_flight"] == 0 for s in states)
            return idle and all(s["kv_bytes"] == 0 for s in states)

        async def alone() -> bool:
            return _connections(front) <= 1

        await until(quiet, SETTLED)
        async with server.client() as client:
            # One model, freshly used, so that the same processes are there at every look.
            await ask(client, TEXT, {"model": NAMES[0], "prompt": "x", "max_tokens": 2})
            await until(quiet, SETTLED)
            await until(alone, SETTLED)
            text = (await client.get("/metrics")).text
        samples = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
        return cls(
            front.memory_info().rss,
            front.num_fds() - _connections(front),
            front.num_threads(),
            int(samples["mlx_server_tasks"]),
        )


def _connections(process: psutil.Process) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in process.net_connections("inet"))


async def live(tmp_path: Path, warm_up: int, rounds: int, requests: int) -> None:
    models = three_models(tmp_path / "own")
    settings = {"prefix_cache": "50%", "disk_cache": "4MB"}
    with pool(tmp_path / "home", models, 1.5 * need_of(models / NAMES[0]), **settings) as server:
        life = Life(server, random.Random(5))
        await life.run(warm_up)
        before = await Holdings.of(server)
        for _ in range(rounds):
            await life.run(requests)
            after = await Holdings.of(server)
            print(f"{life.sent} sent, {dict(life.kinds)}, {before} → {after}")
        states = await server.models()
        print({name: (state["loads"], state["restarts"]) for name, state in states.items()})
        assert server.process.poll() is None
    assert after.rss <= GROWTH * before.rss
    assert after.fds == before.fds
    assert after.threads <= max(before.threads, MOST_THREADS)
    assert after.tasks <= before.tasks + 1
    assert life.kinds["killed"] >= life.sent // KILL_EVERY // 2
    assert min(life.kinds[kind] for kind in ("answered", "dropped", "bad")) > 0


async def test_a_busy_and_unlucky_server_holds_no_more_than_before(tmp_path: Path) -> None:
    await asyncio.wait_for(live(tmp_path, 150, 1, 150), 200)


@pytest.mark.soak
async def test_two_thousand_requests_with_every_misfortune_leave_nothing(tmp_path: Path) -> None:
    await live(tmp_path, 400, 4, 500)
