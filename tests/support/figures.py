"""A server that has nothing but figures, and the page of it: `python -m tests.support.figures`.

Prints the page's address. Each look at the history finds a sample with more tokens.
"""

import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from mlx_server.ui.app import build
from mlx_server.ui.history import HistoryView

INTERVAL = 5.0
SAMPLES = 720

api = FastAPI()
samples: list[dict[str, Any]] = []


@api.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"object": "list", "data": []}


@api.get("/admin/history")
async def history(since: float) -> dict[str, Any]:
    now = time.time()
    if not samples:
        samples.extend(_sample(now - INTERVAL * (SAMPLES - at), at) for at in range(SAMPLES))
    samples.append(_sample(now, len(samples)))
    return {"interval": INTERVAL, "samples": [one for one in samples if one["at"] > since]}


@api.get("/admin/requests")
async def requests() -> dict[str, Any]:
    failed = _request("req_3", finish=["error"], status=500, error="engine_ended")
    running = _request("req_1", seconds=None, status=0, finish=[])
    return {"running": [running], "ended": [_request("req_2"), failed]}


def _sample(at: float, index: int) -> dict[str, Any]:
    wave = 50 + 40 * ((index // 60) % 2) + index % 7
    quiet = index % 100 < 5
    quantiles = {"p50": None if quiet else wave / 1000, "p95": None if quiet else wave / 400}
    models = {"large": _model(8, index)} | ({"small": _model(2, index)} if index > 200 else {})
    return {
        "at": at,
        "prompt_tokens_rate": 10.0 * wave,
        "cached_tokens_rate": 6.0 * wave,
        "generation_tokens_rate": 2.0 * wave + max(0, index - SAMPLES + 1) * 100,
        "time_to_first_token": quantiles,
        "inter_token_latency": quantiles,
        "models": models,
    }


def _model(gigabytes: int, index: int) -> dict[str, Any]:
    return {
        "running": 4 + index // 40 % 3,
        "waiting": index // 90 % 2,
        "memory_bytes": gigabytes * 10**9,
        "restarts": int(index > 400),
    }


def _request(id_: str, **other: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "at": time.time(),
        "protocol": "openai",
        "path": "/v1/chat/completions",
        "client": "alice",
        "status": 200,
        "seconds": 1.5,
        "operation": "chat",
        "model": "large",
        "stream": True,
        "prompt_tokens": 1234,
        "cached_tokens": 1000,
        "completion_tokens": 56,
        "reasoning_tokens": 0,
        "load_seconds": None,
        "render_seconds": 0.002,
        "queue_seconds": 0.01,
        "prefill_seconds": 0.2,
        "decode_seconds": 1.2,
        "first_token_seconds": 0.25,
        "finish": ["stop"],
        "engine_ends": 0,
        "error": None,
    } | other


def listening() -> tuple[socket.socket, str]:
    place = socket.create_server(("127.0.0.1", 0))
    return place, f"http://127.0.0.1:{place.getsockname()[1]}"


def main() -> None:
    api_place, api_url = listening()
    page_place, page_url = listening()
    server = uvicorn.Server(uvicorn.Config(api, log_level="error"))
    threading.Thread(target=server.run, kwargs={"sockets": [api_place]}, daemon=True).start()
    HistoryView.seconds = 0.5
    print(page_url, flush=True)
    uvicorn.Server(uvicorn.Config(build(api_url), log_level="error")).run(sockets=[page_place])


if __name__ == "__main__":
    main()
