"""The demo model, fetched the product's own way, behind one real server for all tests here."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlx_server.config import Settings
from tests.support.sdk import (
    API_KEY,
    async_client,
    client,
    engine_is_free,
    engine_work,
    http,
)
from tests.support.server import Server, serving

__all__ = ["async_client", "client", "engine_is_free", "engine_work", "http"]

MODEL = "smollm2-135m"


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
def sdk_model() -> str:
    return MODEL


@pytest.fixture(scope="session")
def sdk_server(demo_server: Server) -> Server:
    return demo_server
