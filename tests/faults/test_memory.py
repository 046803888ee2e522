"""An engine for which the system has no memory left."""

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import TINY, running
from tests.support.server import CHAT, TEXT, Server, ask, chat, serving, until
from tests.support.ties import same

ROOM = 8 << 20
"""Bytes that the engine may still take: enough for steps, too little for long prompts."""

LOOKING = {"ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process, as Linux can")
async def test_streams_outlive_an_engine_that_gets_no_more_memory(
    tmp_path: Path, tiny: Path
) -> None:
    with serving(tmp_path, "--model", str(tiny), prefix_cache="0", steps_may_fail=True) as server:
        bodies = [
            chat(TINY, max_tokens=200, seed=i, temperature=i % 2, **LOOKING) for i in range(4)
        ]
        async with server.client() as client:
            expected = await asyncio.gather(*(ask(client, CHAT, body) for body in bodies))
            async with running(client, *((CHAT, body) for body in bodies)) as streams:
                [engine] = server.engines()
                limit = engine.memory_info().vms + ROOM
                engine.rlimit(psutil.RLIMIT_AS, (limit, psutil.RLIM_INFINITY))
                greedy = [
                    asyncio.create_task(
                        client.post(
                            TEXT, json={"model": TINY, "prompt": [i] * 5_000, "max_tokens": 2}
                        )
                    )
                    for i in (5, 6)
                ]
                await until(lambda: _felt(server), 60)
                if engine.is_running():
                    engine.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
                answers = await asyncio.gather(*streams)
                statuses = [answer.status_code for answer in await asyncio.gather(*greedy)]
            assert sum(map(same, answers, expected)) <= 1
            assert set(statuses) <= {200, 500}
            assert (await ask(client, CHAT, bodies[0])).text == expected[0].text
        assert (await server.idle(TINY, 10))["kv_bytes"] == 0


async def _felt(server: Server) -> bool:
    """Whether the engine has run out of memory, and lived or died of it."""
    log = server.log.read_text(errors="replace")
    return "event=step_failed" in log or '"event": "engine_ended"' in log
