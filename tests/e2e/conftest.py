"""The demo model, fetched the product's own way, behind one real server for all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.support.demo import MODEL, demo_model
from tests.support.sdk import (
    API_KEY,
    async_client,
    client,
    engine_is_free,
    engine_work,
    http,
)
from tests.support.server import Server, serving

__all__ = ["async_client", "client", "demo_model", "engine_is_free", "engine_work", "http"]


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
def sdk_model() -> str:
    return MODEL


@pytest.fixture(scope="session")
def sdk_server(demo_server: Server) -> Server:
    return demo_server
