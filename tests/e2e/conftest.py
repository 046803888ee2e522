"""The demo model, fetched the product's own way, behind one real server for all tests here."""

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from mlx_server.config import Settings
from tests.support.server import Server, serving, until

MODEL = "smollm2-135m"
API_KEY = "a-key-for-the-tests"
FREE_SECONDS = 1.0
"""How soon the engine must have let go of a request whose client left."""


def pulled(model: str) -> Path:
    """The folder of a model, which is pulled if it is not there."""
    pull = [sys.executable, "-m", "mlx_server", "pull", model]
    done = subprocess.run(pull, capture_output=True, text=True)
    assert done.returncode == 0, f"{model} could not be pulled:\n{done.stderr[-4000:]}"
    return Settings.load().models_folder / model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model."""
    return pulled(MODEL)


@pytest.fixture(scope="session")
def demo_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that all tests here share: leave it as you found it."""
    home = tmp_path_factory.mktemp("home")
    # A home of its own, for its log, with the models of the real one.
    (home / "models").symlink_to(demo_model.parent, target_is_directory=True)
    with serving(home, "--model", MODEL, "--api-key", API_KEY) as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path) -> Tokenizer:
    """The demo model's tokenizer, to know its tokens by their ids."""
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


@pytest.fixture(scope="session")
async def http(demo_server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client without an SDK, which shows bodies as they are on the wire."""
    async with demo_server.client(headers={"Authorization": f"Bearer {API_KEY}"}) as plain:
        yield plain


@pytest.fixture(scope="session")
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    """The official SDK, as a user sets it up."""
    with openai.OpenAI(
        base_url=f"{demo_server.url}/v1",
        api_key=API_KEY,
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as sdk:
        yield sdk


@pytest.fixture(scope="session")
async def async_client(demo_server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official SDK's asynchronous form."""
    async with openai.AsyncOpenAI(
        base_url=f"{demo_server.url}/v1",
        api_key=API_KEY,
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as sdk:
        yield sdk


@pytest.fixture
def engine_work(http: httpx.AsyncClient) -> Callable[[], Awaitable[dict[str, int]]]:
    """Asks the server what the demo model's engine works on."""

    async def work() -> dict[str, int]:
        models: list[dict[str, Any]] = (await http.get("/admin/models")).json()["models"]
        status = next(model for model in models if model["id"] == MODEL)
        return {name: status[name] for name in ("in_flight", "running", "waiting")}

    return work


@pytest.fixture
def engine_is_free(
    engine_work: Callable[[], Awaitable[dict[str, int]]],
) -> Callable[[], Awaitable[None]]:
    """Waits until the engine works on nothing, and fails if that takes long."""
    work: dict[str, int] = {}

    async def free() -> bool:
        nonlocal work
        work = await engine_work()
        return not any(work.values())

    async def wait() -> None:
        await until(free, FREE_SECONDS, lambda: f"still at work: {work}")

    return wait
