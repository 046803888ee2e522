"""Open WebUI's back end: its users list our models and chat with them, streamed and whole."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.clients.installing import Python
from tests.clients.stage import Stage
from tests.support.rehearsal import Play

pytestmark = pytest.mark.soak

WEBUI = Python(("open-webui==0.12.4",), ("3.12", "3.11"))
START_SECONDS = 180
ANSWER = "Good morning to you all."


@contextmanager
def running(stage: Stage, model: str) -> Iterator[httpx.Client]:
    """The back end, started by `launch`, and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    commands = stage.install("webui", WEBUI)
    command = [sys.executable, "-m", "mlx_server", "launch", "open-webui", "--model", model]
    command += ["--port", stage.server.url.rpartition(":")[2]]
    own = {"DATA_DIR": str(stage.user / "data"), "WEBUI_SECRET_KEY": "secret"}
    # It would load a model for embeddings from a hub.
    own |= {"OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "openai"}
    with (stage.user / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--", "--host", "127.0.0.1", "--port", port],
            cwd=stage.work,
            env=stage.environment(commands) | own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False
        ) as client:
            _wait(client, process)
            yield client
    except BaseException:
        print((stage.user / "log").read_text(errors="replace")[-6000:])
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise AssertionError("Open WebUI did not start")


def test_open_webui(stage: Stage) -> None:
    model = stage.cast("webui-play", Play((ANSWER,)), "qwen2.5")
    before = stage.mark()
    with running(stage, model) as client:
        user = {"name": "Ann", "email": "ann@example.org", "password": "a long Pass-word 1"}
        signed = client.post("/api/v1/auths/signup", json=user)
        assert signed.status_code == 200, signed.text
        client.headers["Authorization"] = f"Bearer {signed.json()['token']}"
        listed = client.get("/api/models").json()["data"]
        assert model in [one["id"] for one in listed]
        body = {"model": model, "messages": [{"role": "user", "content": "Greet."}]}
        whole = client.post("/api/chat/completions", json=body | {"stream": False})
        assert whole.status_code == 200, whole.text
        assert whole.json()["choices"][0]["message"]["content"] == ANSWER
        streamed = client.post("/api/chat/completions", json=body | {"stream": True})
        assert "Good mor" in streamed.text
        assert "[DONE]" in streamed.text
    requests = stage.requests_since(before)
    print(requests)
    assert ("POST", "/v1/chat/completions", 200) in requests
    assert all(status == 200 for _, _, status in requests), requests
