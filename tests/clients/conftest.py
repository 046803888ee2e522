"""One real server for all programs, with a model for each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.stage import Stage
from tests.support.server import Server, serving


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients") / "models"


@pytest.fixture(scope="session")
def client_server(models: Path) -> Iterator[Server]:
    with serving(models.parent, kv_cache="2GB") as server:
        yield server


@pytest.fixture(scope="session")
def installs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("installs")


@pytest.fixture
def stage(client_server: Server, models: Path, installs: Path, tmp_path: Path) -> Stage:
    stage = Stage(client_server, models, installs, tmp_path / "user")
    stage.work.mkdir(parents=True)
    return stage
