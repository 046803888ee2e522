"""A protocol that only this file knows gets every answer in its own shape.

Its error is `{"oops": CODE}`; its streams are lines `NUMBER NAME JSON`, with pings `.` and a last
line `bye`.
"""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from fastapi import APIRouter

from mlx_server.api.http.connection import SPARE_CONNECTIONS, ConnectionLimits
from mlx_server.api.http.dependencies import CallerDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.limits import Window
from mlx_server.api.http.streaming import StreamedAnswer
from mlx_server.api.http.wire import ApiProtocol, Failure, HeaderPairs, StreamEvent, Wire
from mlx_server.config import Settings
from mlx_server.errors import ModelNotFound, TooManyRequests
from mlx_server.main import PROTOCOLS, create_app
from mlx_server.schemas.objects import RequestObject, ResponseObject
from mlx_server.server import Server
from tests.server.test_errors import assert_refused
from tests.support.server import PLAIN

KEY = "a-key"
PATIENCE = 0.5
SMALL: dict[str, Any] = {
    "max_connections": 4,
    "max_header_bytes": 4096,
    "max_body_bytes": 1024,
    "receive_timeout": PATIENCE,
    "cors_origins": ["http://page.example"],
}

# the protocol


class StubError(ResponseObject):
    oops: str | None


class StubRequest(RequestObject):
    ending: Literal["well", "refused", "failed", "bug", "never"]


def _oops(failure: Failure) -> bytes:
    return StubError(oops=failure.code or failure.param).to_json()


def _line(event: StreamEvent, number: int) -> bytes:
    return b"%d %b %b\n" % (number, event.name.encode(), event.data)


def _headers(request_id: str) -> HeaderPairs:
    return [(b"stub-request", request_id.encode())]


def _rate_headers(kind: str, window: Window) -> HeaderPairs:
    return [(f"stub-left-{kind}".encode(), str(window.remaining).encode())]


WIRE = Wire(
    name="stub",
    error_model=StubError,
    error_body=_oops,
    error_event=lambda failure: StreamEvent(_oops(failure), "oops"),
    frame=_line,
    ping=b".\n",
    longest_silence=0.05,
    end=b"bye\n",
    media_type="application/x-stub",
    headers=_headers,
    rate_headers=_rate_headers,
    exposed_headers=("stub-left-requests",),
)
router = APIRouter(route_class=JsonRoute, strict_content_type=False)
# A path of OpenAI's prefix too, so that the longer prefix must win.
STUB = ApiProtocol(wire=WIRE, routers=(router,), prefixes=("/stub", "/v1/stub"))


@router.post("/stub")
@router.post("/v1/stub")
async def answer(body: StubRequest, caller: CallerDep) -> StreamedAnswer:
    return StreamedAnswer(_opened(body.ending), idle=lambda: StreamEvent(b"0", "idle"))


@asynccontextmanager
async def _opened(ending: str) -> AsyncIterator[AsyncIterator[Sequence[StreamEvent]]]:
    if ending == "refused":
        raise ModelNotFound("There is no such model.")
    yield _events(ending)


async def _events(ending: str) -> AsyncIterator[Sequence[StreamEvent]]:
    yield [StreamEvent(b"1", "one"), StreamEvent(b"2", "two")]
    match ending:
        case "failed":
            raise TooManyRequests("The queue is full.", code="queue_timeout")
        case "bug":
            raise ZeroDivisionError
        case "never":
            await asyncio.Event().wait()
    yield [StreamEvent(b"3", "three")]


# a server that speaks it


class Running:
    def __init__(self, server: Server, address: tuple[str, int]) -> None:
        self._server = server
        self.host, self.port = address

    def client(self, **headers: str) -> httpx.AsyncClient:
        url = f"http://{self.host}:{self.port}"
        return httpx.AsyncClient(base_url=url, headers=headers, **PLAIN)

    def stop(self) -> None:
        if not self._server.should_exit:
            self._server.handle_exit(signal.SIGTERM, None)

    async def raw(self, sent: bytes) -> tuple[int, Any]:
        """The status and the JSON that answer `sent` on a connection of its own."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(sent)
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split(b" ", 2)[1]), json.loads(body)


@asynccontextmanager
async def running(home: Path, **more: Any) -> AsyncIterator[Running]:
    settings = Settings(home=home, **(SMALL | more))
    app = create_app(settings, protocols=(*PROTOCOLS, STUB))
    started = asyncio.Event()
    limits = ConnectionLimits.of(settings)

    async def greet() -> None:
        started.set()

    server = Server(app, limits, settings.grace_period, greet)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([listener]))
        await asyncio.wait_for(started.wait(), 60)
        here = Running(server, listener.getsockname())
        try:
            yield here
        finally:
            here.stop()
            await serving


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("stub")) as server:
        yield server


@pytest.fixture
async def client(server: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


def assert_oops(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"oops": code}
    assert response.headers["stub-request"] == response.headers["x-request-id"]


# refusals


async def test_a_body_that_does_not_fit_its_schema_is_refused(client: httpx.AsyncClient) -> None:
    assert_oops(await client.post("/stub", json={"ending": "odd"}), 400, "ending")
    assert_oops(await client.post("/v1/stub", content=b"{"), 400, "invalid_json")


async def test_unknown_paths_and_methods_are_refused_as_their_prefix_says(
    client: httpx.AsyncClient,
) -> None:
    assert_oops(await client.get("/stub/nothing"), 404, "not_found")
    assert_oops(await client.get("/v1/stub/nothing"), 404, "not_found")
    refused = await client.get("/stub")
    assert_oops(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "POST"
    for path in ("/v1/nothing", "/v1/stubborn", "/nothing"):
        refused = await client.get(path)
        assert assert_refused(refused, 404)["code"] == "not_found"
        assert "stub-request" not in refused.headers


async def test_the_layers_before_the_routes_refuse_in_the_protocols_shape(
    client: httpx.AsyncClient,
) -> None:
    body = {"ending": "well"}
    foreign = {"origin": "http://evil.example"}
    assert_oops(
        await client.post("/stub", json=body, headers={"host": "evil.example"}), 400, "invalid_host"
    )
    assert_oops(await client.post("/stub", json=body, headers=foreign), 403, "invalid_origin")
    assert_oops(await client.post("/stub", content=b"x" * 2000), 413, "body_too_large")


async def test_the_connection_refuses_in_the_shape_of_the_path_it_has_read(server: Running) -> None:
    head = b"POST /stub HTTP/1.1\r\nHost: localhost\r\n"
    large = b"X-Large: %b\r\n" % (b"x" * 5000)
    too_large = {"oops": "headers_too_large"}
    assert await server.raw(head + large) == (431, too_large)
    assert await server.raw(head + large + b"\r\n") == (431, too_large)
    late = {"oops": "receive_timeout"}
    assert await server.raw(head) == (408, late)
    body = b"Content-Length: 9\r\n\r\n"
    assert await server.raw(head + body) == (408, late)
    _, other = await server.raw(b"\x16\x03\x01 hello\r\n\r\n")
    assert other["error"]["code"] == "invalid_http"


async def test_too_many_connections_are_refused_in_the_protocols_shape(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, receive_timeout=30) as server:
        crowd = [await asyncio.open_connection(server.host, server.port) for _ in range(4)]
        async with server.client() as client:
            refused = await client.post("/stub", json={"ending": "well"})
            assert_oops(refused, 503, "too_many_connections")
            assert refused.headers["retry-after"] == "1"
        crowd += [
            await asyncio.open_connection(server.host, server.port)
            for _ in range(SPARE_CONNECTIONS)
        ]
        _, other = await server.raw(b"")  # which has named no path
        assert other["error"]["code"] == "too_many_connections"
        for _, writer in crowd:
            writer.close()


async def test_keys_and_rates_are_refused_in_the_protocols_shape(tmp_path: Path) -> None:
    async with running(tmp_path, api_keys=[KEY], requests_per_minute=2) as server:
        body = {"ending": "well"}
        async with server.client() as stranger:
            refused = await stranger.post("/stub", json=body)
            assert_oops(refused, 401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        async with server.client(authorization=f"Bearer {KEY}") as client:
            answers = [await client.post("/stub", json=body) for _ in range(3)]
        assert [one.status_code for one in answers] == [200, 200, 429]
        assert [one.headers["stub-left-requests"] for one in answers] == ["1", "0", "0"]
        assert_oops(answers[-1], 429, "rate_limit_exceeded")
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert "x-ratelimit-limit-requests" not in answers[-1].headers


# streams


async def test_a_stream_has_the_protocols_frames_and_end(client: httpx.AsyncClient) -> None:
    response = await client.post("/stub", json={"ending": "well"})
    assert response.headers["content-type"] == "application/x-stub"
    assert response.text == "0 one 1\n1 two 2\n2 three 3\nbye\n"


async def test_an_error_before_the_first_event_is_a_status(client: httpx.AsyncClient) -> None:
    response = await client.post("/stub", json={"ending": "refused"})
    assert_oops(response, 404, "model_not_found")


@pytest.mark.parametrize(
    ("ending", "code"), [("failed", "queue_timeout"), ("bug", "internal_error")]
)
async def test_an_error_in_a_stream_is_its_last_event(
    client: httpx.AsyncClient, ending: str, code: str
) -> None:
    response = await client.post("/stub", json={"ending": ending})
    assert response.status_code == 200
    last = f'2 oops {{"oops":"{code}"}}'
    assert response.text.splitlines() == ["0 one 1", "1 two 2", last]


@pytest.mark.parametrize(("ping", "seen"), [("chunk", "3 idle 0"), ("none", "1 two 2")])
async def test_a_silent_stream_is_kept_open_as_the_settings_say(
    tmp_path: Path, ping: str, seen: str
) -> None:
    lines: list[str] = []
    async with (
        running(tmp_path, grace_period=0.3, ping=ping) as server,
        server.client() as client,
        client.stream("POST", "/stub", json={"ending": "never"}) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(line)
            if line == seen:
                server.stop()
    pings = [f"{number} idle 0" for number in range(2, len(lines) - 1)]
    assert lines[2:-1] == (pings if ping == "chunk" else [])
    assert lines[-1].endswith('oops {"oops":"server_stopping"}')


async def test_a_silent_stream_is_pinged_and_ended_by_a_stopping_server(tmp_path: Path) -> None:
    lines: list[str] = []
    async with (
        running(tmp_path, grace_period=0.3) as server,
        server.client() as client,
        client.stream("POST", "/stub", json={"ending": "never"}) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(line)
            if line == "." and lines.count(".") == 3:
                server.stop()
                refused = await client.post("/stub", json={"ending": "well"})
                assert_oops(refused, 503, "server_stopping")
    assert lines[-1] == '2 oops {"oops":"server_stopping"}'
    assert set(lines[:-1]) == {"0 one 1", "1 two 2", "."}


# the rest of the application


def test_the_description_gives_the_protocols_errors(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path, **SMALL), protocols=(*PROTOCOLS, STUB))
    paths = app.openapi()["paths"]

    def described(path: str) -> str:
        default = paths[path]["post"]["responses"]["default"]
        return str(default["content"]["application/json"]["schema"]["$ref"])

    assert described("/stub").endswith("/StubError")
    assert described("/v1/completions").endswith("/ErrorBody")


async def test_pages_may_read_the_protocols_headers(client: httpx.AsyncClient) -> None:
    page = {"origin": "http://page.example"}
    exposed = (await client.get("/health", headers=page)).headers["access-control-expose-headers"]
    assert "stub-left-requests" in exposed
    assert "x-ratelimit-limit-requests" in exposed
