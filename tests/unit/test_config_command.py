"""`config`: what is in force, where it came from, and a file that can be written for it."""

import json
import tomllib
from pathlib import Path

import pytest

from mlx_server.cli.config_commands import commented_file
from mlx_server.config import Settings
from tests.support.command import environment, refusal, run

__all__ = ["environment"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The settings that are read by themselves."""
    file = tmp_path / "home" / "config.toml"
    file.parent.mkdir()
    return file


def test_each_setting_tells_where_it_came_from(environment: dict[str, str], file: Path) -> None:
    file.write_text('port = 9000\nmax_batch = 3\napi_keys = ["secret"]\n')
    environment["MLX_SERVER_MAX_BATCH"] = "5"
    environment["MLX_SERVER_ALIASES__SMALL"] = "org/small"
    shown = json.loads(run(environment, "config", "--json").stdout)
    assert shown["port"] == {"value": 9000, "from": str(file)}
    assert shown["max_batch"] == {"value": 5, "from": "$MLX_SERVER_MAX_BATCH"}
    assert shown["aliases"]["from"] == "$MLX_SERVER_ALIASES__SMALL"
    assert shown["host"] == {"value": "127.0.0.1", "from": "default"}
    assert shown.keys() == Settings.model_fields.keys()


def test_no_key_is_shown(environment: dict[str, str], file: Path) -> None:
    file.write_text('api_keys = ["hidden"]\nworker_secret = "hidden"\n')
    for arguments in (("config",), ("config", "--json")):
        assert "hidden" not in run(environment, *arguments).stdout


def test_only_what_was_set_is_shown_where_asked(environment: dict[str, str]) -> None:
    environment["MLX_SERVER_PORT"] = "9000"
    shown = json.loads(run(environment, "config", "--changed", "--json").stdout)
    assert shown.keys() == {"port", "home"}


def test_a_written_file_is_read_by_itself_and_changes_nothing(
    environment: dict[str, str], file: Path
) -> None:
    assert "read by itself" in run(environment, "config", "init").stdout
    before = json.loads(run(environment, "config", "--json").stdout)
    assert {one["from"] for one in before.values()} == {"default", "$MLX_SERVER_HOME"}
    assert "--force" in refusal(environment, "config", "init")
    assert run(environment, "config", "init", "--force").returncode == 0


def test_every_line_of_a_written_file_is_a_setting_once_uncommented() -> None:
    lines = commented_file().splitlines()
    text = "\n".join(line[1:] for line in lines if line[:1] == "#" and line[1:2] != " ")
    given = tomllib.loads(text)
    assert given.keys() == Settings.model_fields.keys()
    fields = Settings.model_fields.items()
    plain = {name for name, field in fields if field.get_default(call_default_factory=True)}
    assert Settings.model_validate({name: given[name] for name in plain - {"adapters"}})


def test_nothing_that_is_set_is_said_in_words(environment: dict[str, str]) -> None:
    del environment["MLX_SERVER_HOME"]
    assert "Nothing is set" in run(environment, "config", "--changed").stdout
    assert json.loads(run(environment, "config", "--changed", "--json").stdout) == {}
