"""Names that reach the server, and what it asks a key for."""

import itertools
import socket
from typing import Any

import httpx

from mlx_server.config import Settings
from mlx_server.main import create_app

KEY = {"authorization": "Bearer a-key"}
KEYED = {"api_keys": ["a-key"]}
PAGE = "http://page.example"


def client(**settings: Any) -> httpx.AsyncClient:
    app = create_app(Settings(**settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000")


async def status_of(asked: httpx.AsyncClient, host: str) -> int:
    return (await asked.get("/health", headers={"host": host})).status_code


OURS = [
    *("localhost", "localhost.", "LOCALHOST:8000", "app.localhost:1"),
    *(
        "127.0.0.1",
        "127.9.9.9:8000",
        "192.168.1.5:8000",
        "[::1]:8000",
        "[fe80::1%25en0]:8000",
        "::1",
    ),
    *(
        "mac-mini.local",
        "Mac-Mini.local.:8000",
        "host.docker.internal",
        "host.docker.internal:8000",
    ),
    *("llm.default.svc.cluster.internal", "nas.home.arpa", "mlx-server", "mlx_server:8000"),
    socket.gethostname(),
]
FOREIGN = [
    *("evil.example", "127.0.0.1.evil.example", "local.evil.example", "evil.example:8000"),
    *(
        "",
        ".",
        ".local",
        "localhost@evil",
        "a b.local",
        "evil.example.",
        "internal.example",
    ),
]


async def test_on_loopback_a_host_is_a_name_that_no_public_dns_gives() -> None:
    for settings in ({}, KEYED):
        async with client(**settings) as asked:
            assert {host: await status_of(asked, host) for host in OURS} == dict.fromkeys(OURS, 200)
            assert {host: await status_of(asked, host) for host in FOREIGN} == dict.fromkeys(
                FOREIGN, 400
            )


async def test_beyond_loopback_any_name_will_do_where_a_key_is_asked_for() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        async with client(host=host, **KEYED) as asked:
            assert await status_of(asked, "llm.example:8000") == 200
        async with client(host=host, allow_no_key=True) as asked:
            assert await status_of(asked, "llm.example:8000") == 400
        async with client(host=host, admin_keys=["a-key"], allow_no_key=True) as asked:
            assert await status_of(asked, "llm.example:8000") == 400


async def test_further_names_are_the_operators_to_allow() -> None:
    async with client(allowed_hosts=["LLM.example"]) as asked:
        assert await status_of(asked, "llm.example:443") == 200
        assert await status_of(asked, "other.example") == 400


async def test_the_description_asks_for_a_key_where_the_api_does() -> None:
    paths = ("/docs", "/redoc", "/openapi.json")
    async with client(**KEYED) as asked:
        for path, method in itertools.product(paths, ("GET", "HEAD")):
            assert (await asked.request(method, path)).status_code == 401, path
            assert (await asked.request(method, path, headers=KEY)).status_code == 200, path
    async with client() as asked:
        for path in paths:
            assert (await asked.get(path)).status_code == 200, path


async def test_a_page_from_another_network_may_call_if_its_origin_is_named() -> None:
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    async with client(cors_origins=[PAGE]) as asked:

        async def answer(origin: str) -> httpx.Response:
            return await asked.options("/v1/models", headers={"origin": origin, **preflight})

        assert (await answer(PAGE)).headers["access-control-allow-private-network"] == "true"
        assert (await answer("http://evil.example")).status_code == 400
        assert "access-control-allow-origin" not in (await answer("http://evil.example")).headers
