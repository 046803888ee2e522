"""Homes that cannot be written or do not exist, and settings that are set to nothing."""

import fcntl
import os
import pwd
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlx_server.cli import app
from mlx_server.config import Settings
from mlx_server.errors import BadRequest, ModelLoadFailed, Unavailable
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.locks import ModelLock, RemovalLock, try_write_lock
from mlx_server.models.store.sources import ModelSources


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder that nobody can make, not even root."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "home"


def test_a_home_that_cannot_be_written_costs_the_lock_and_not_the_model(
    unwritable: Path, tmp_path: Path
) -> None:
    lock = ModelLock(unwritable, tmp_path)
    lock.release()
    lock.release()


@pytest.mark.parametrize("reason", [OSError(95, "no locks here"), OSError(28, "no space")], ids=str)
def test_a_file_system_without_locks_costs_the_lock_and_not_the_model(
    tmp_path: Path, reason: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise reason

    monkeypatch.setattr(fcntl, "flock", refuse)
    ModelLock(tmp_path, tmp_path).release()


def test_locks_hold_where_they_can(tmp_path: Path) -> None:
    lock = ModelLock(tmp_path, tmp_path)
    with pytest.raises(BadRequest, match="loaded"):
        RemovalLock(tmp_path, tmp_path)
    lock.release()
    with RemovalLock(tmp_path, tmp_path), pytest.raises(ModelLoadFailed, match="removed"):
        ModelLock(tmp_path, tmp_path)


def test_nothing_is_removed_while_nobody_can_tell_who_uses_it(
    unwritable: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match="Not a directory"):
        RemovalLock(unwritable, tmp_path)
    with pytest.raises(Unavailable, match="cannot be written"), try_write_lock(unwritable / "m"):
        pass


@pytest.mark.parametrize("name", ["HOME", "PORT", "API_KEYS", "KV_BITS", "KEYS_FILE", "ALIASES"])
def test_an_empty_variable_counts_as_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"MLX_SERVER_{name}", raising=False)
    unset = Settings.load()
    monkeypatch.setenv(f"MLX_SERVER_{name}", "")
    assert Settings.load() == unset


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whatever is changed in it comes back."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return monkeypatch


def run_version() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mlx-server", "--version"])
        with pytest.raises(SystemExit):
            app.main()


def test_a_librarys_empty_variable_counts_as_unset(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HF_HOME", "")
    environment.setenv("XDG_CACHE_HOME", "/somewhere")
    environment.setenv("OF_SOMEBODY_ELSE", "")
    run_version()
    assert "HF_HOME" not in os.environ
    assert (os.environ["XDG_CACHE_HOME"], os.environ["OF_SOMEBODY_ELSE"]) == ("/somewhere", "")


@pytest.mark.parametrize("text", ['home = ""', 'model_dirs = ["/a", ""]', 'keys_file = ""'])
def test_an_empty_path_is_refused_and_not_the_working_directory(tmp_path: Path, text: str) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(text)
    with pytest.raises(ValidationError, match="must not be empty"):
        Settings.load(config)


@pytest.mark.parametrize("home", [None, ""])
def test_a_user_without_a_home_has_no_models_and_starts(
    home: str | None, environment: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    environment.setattr(pwd, "getpwuid", nobody)
    environment.delenv("HOME")
    if home is not None:
        environment.setenv("HOME", home)
    run_version()
    settings = Settings()
    assert settings.home == Path("/nonexistent/.mlx-server")
    assert Catalog(ModelSources.of(settings)).entries() == []


def test_the_home_of_an_unknown_user_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MLX_SERVER_HOME", "~nobody-of-this-name/models")
    with pytest.raises(ValidationError, match="nobody here"):
        Settings()
