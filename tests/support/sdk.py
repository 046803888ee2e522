"""The official SDK as tests use it. A conftest imports these fixtures, and has a `sdk_server` that
serves `sdk_model` to whoever has the key."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionUsage

from tests.support.server import Server, until

API_KEY = "a-key-for-the-tests"
FREE_SECONDS = 1.0
"""How soon the engine must have let go of a request whose client left."""


@pytest.fixture(scope="session")
async def http(sdk_server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client without an SDK, which shows bodies as they are on the wire."""
    async with sdk_server.client(headers={"Authorization": f"Bearer {API_KEY}"}) as plain:
        yield plain


@pytest.fixture(scope="session")
def client(sdk_server: Server) -> Iterator[openai.OpenAI]:
    """The official SDK, as a user sets it up."""
    with openai.OpenAI(
        base_url=f"{sdk_server.url}/v1",
        api_key=API_KEY,
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as sdk:
        yield sdk


@pytest.fixture(scope="session")
async def async_client(sdk_server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official SDK's asynchronous form."""
    async with openai.AsyncOpenAI(
        base_url=f"{sdk_server.url}/v1",
        api_key=API_KEY,
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as sdk:
        yield sdk


@pytest.fixture
def engine_work(http: httpx.AsyncClient, sdk_model: str) -> Callable[[], Awaitable[dict[str, int]]]:
    """Asks the server what the model's engine works on."""

    async def work() -> dict[str, int]:
        models: list[dict[str, Any]] = (await http.get("/admin/models")).json()["models"]
        status = next(model for model in models if model["id"] == sdk_model)
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


def counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """Prompt, completion and total; how much was cached depends on what came before, and how much
    was guessed on how long passes took.
    """
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
