"""The official SDK against a tiny random model: shapes, errors and endings, whatever is said."""

from collections.abc import Iterator

import pytest

from tests.support.sdk import (
    API_KEY,
    async_client,
    client,
    engine_is_free,
    engine_work,
    http,
)
from tests.support.server import Server, serving
from tests.support.tiny import build_tiny_model

__all__ = ["async_client", "client", "engine_is_free", "engine_work", "http"]

MODEL = "tiny"
CONTEXT = 8192


@pytest.fixture(scope="session")
def sdk_model() -> str:
    return MODEL


@pytest.fixture(scope="session")
def sdk_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that all tests here share: leave it as you found it."""
    home = tmp_path_factory.mktemp("sdk")
    build_tiny_model(home / "models" / MODEL, context=CONTEXT)
    with serving(home, "--model", MODEL, "--api-key", API_KEY) as server:
        yield server
