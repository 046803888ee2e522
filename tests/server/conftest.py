"""The server that tests of the HTTP side share: a real one, with a tiny real model."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import PLAIN, Server, serving
from tests.support.tiny import build_tiny_model

MODEL = "tiny-llama"
CONTEXT = 2048


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand parameters, called `MODEL`."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / MODEL, "llama", context=CONTEXT)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server that many tests share: leave it as you found it."""
    with serving(tmp_path_factory.mktemp("home"), "--model", str(tiny_model)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A blocking client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=60, **PLAIN) as client:
        yield client
