"""The web page over HTTP: who gets it, and what it costs whoever never asks for it."""

import subprocess
import sys

import httpx
import psutil
import pytest

from mlx_server.config import Settings
from mlx_server.main import create_app
from tests.server.test_errors import assert_refused
from tests.support.raw import Raw
from tests.support.server import Server, until

SOCKET = "/ui/_nicegui_ws/socket.io/?EIO=4&transport="
ELSEWHERE = "http://elsewhere.example"


def pages(server: Server) -> list[psutil.Process]:
    return [one for one in server.children() if "mlx_server.ui" in one.cmdline()]


async def answer_of(app: object, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path)


def handshake(server: Server, **headers: str) -> str:
    """The head of the answer to a request for a WebSocket, which is then closed."""
    asked = {
        "Host": server.url.removeprefix("http://"),
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    } | headers
    lines = [f"GET {SOCKET}websocket HTTP/1.1", *(f"{k}: {v}" for k, v in asked.items()), "", ""]
    with Raw(server) as connection:
        connection.socket.sendall("\r\n".join(lines).encode())
        return connection.socket.recv(65536).decode("latin-1").partition("\r\n\r\n")[0]


def test_the_page_is_made_by_a_process_that_starts_when_it_is_asked_for(
    server: Server, client: httpx.Client
) -> None:
    for page in pages(server):  # other tests of this server may have asked for it
        page.kill()
        page.wait(30)
    moved = client.get("/ui")
    assert (moved.status_code, moved.headers["location"]) == (308, "/ui/")
    assert not pages(server)
    answer = client.get("/ui/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text.replace("http://www.w3.org", "")
    assert "https://" not in answer.text
    assert len(pages(server)) == 1


async def test_whoever_asks_after_its_process_died_gets_another(server: Server) -> None:
    async with server.client() as client:
        await client.get("/ui/")
        (before,) = pages(server)
        before.kill()

        async def is_back() -> bool:
            return (await client.get("/ui/")).status_code == 200

        await until(is_back, 30)
        (after,) = pages(server)
        assert after.pid != before.pid


def test_a_websocket_is_opened_for_the_page_itself_and_for_no_other(server: Server) -> None:
    assert handshake(server, Origin=server.url).startswith("HTTP/1.1 101 ")
    assert handshake(server, Origin=ELSEWHERE).startswith("HTTP/1.1 403 ")
    assert handshake(server, Host="elsewhere.example").startswith("HTTP/1.1 400 ")


def test_pages_of_other_origins_may_not_even_read(client: httpx.Client) -> None:
    for path in ("/ui/", f"{SOCKET}polling"):
        refused = client.get(path, headers={"Origin": ELSEWHERE})
        assert assert_refused(refused, 403)["code"] == "invalid_origin"
        assert client.get(path).headers.get("access-control-allow-origin") is None


async def test_what_the_page_reads_every_few_seconds_is_not_logged(
    server: Server,
) -> None:
    async with server.client() as client:
        for agent, request in (("mlx-server-page", "page-look"), ("curl/8", "other-look")):
            headers = {"User-Agent": agent, "X-Request-Id": request}
            assert (await client.get("/admin/models", headers=headers)).status_code == 200

    async def is_logged() -> bool:
        return "other-look" in server.log.read_text()

    await until(is_logged, 10)
    assert "page-look" not in server.log.read_text()


def test_requests_to_upgrade_elsewhere_get_ordinary_answers(client: httpx.Client) -> None:
    asked = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert client.get("/health", headers=asked).json() == {"status": "ok"}


async def test_the_page_can_be_switched_off_and_one_that_is_not_installed_says_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off = await answer_of(create_app(Settings(ui=False)), "/ui")
    assert off.status_code == 404
    monkeypatch.setattr("mlx_server.main.installed", lambda: False)
    missing = await answer_of(create_app(Settings()), "/ui")
    assert missing.status_code == 404
    assert "pip install 'mlx-server[ui]'" in missing.json()["error"]["message"]


def test_the_front_never_imports_what_the_page_needs() -> None:
    code = """
import sys
from mlx_server.config import Settings
from mlx_server.main import create_app
create_app(Settings())
assert not {"nicegui", "socketio", "mlx_server.ui"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
