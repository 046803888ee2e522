"""`mlx-server launch`: what it sets for each program, whom it asks, and when it refuses."""

import json
import os
import pty
import shlex
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_server.cli.launch.program import Setup, Target
from mlx_server.cli.launch.programs import PROGRAMS
from tests.support.command import COMMAND, Done, environment, refusal, run

__all__ = ["environment"]

TARGET = Target("http://127.0.0.1:8000", "secret", "org/a model", 100_000)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "home" / "models"


def make(models: Path, name: str, context: int = 131_072) -> None:
    folder = models / name
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")


def printed(environment: dict[str, str], *arguments: str) -> Done:
    environment["MLX_SERVER_PORT"] = "9"
    done = run(environment, "launch", "--print", *arguments)
    assert done.returncode == 0, done.stderr
    return done


def setup_of(name: str, folder: Path) -> Setup:
    return PROGRAMS[name].set_up(TARGET, folder)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_is_told_the_server_the_key_and_the_model(name: str, tmp_path: Path) -> None:
    setup = setup_of(name, tmp_path)
    told = " ".join([*setup.environment.values(), *setup.arguments, *setup.files.values()])
    assert all(fact in told for fact in (TARGET.url, TARGET.key, TARGET.model))


@pytest.mark.parametrize("name", PROGRAMS)
def test_setting_a_program_up_writes_nothing_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    setup_of(name, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_codex_gets_its_settings_as_toml(tmp_path: Path) -> None:
    arguments = setup_of("codex", tmp_path).arguments
    lines = [after for before, after in pairwise(arguments) if before == "-c"]
    settings = tomllib.loads("\n".join(lines))
    provider = settings["model_providers"][settings["model_provider"]]
    assert provider["base_url"] == "http://127.0.0.1:8000/v1"
    assert setup_of("codex", tmp_path).environment[provider["env_key"]] == "secret"
    assert settings["model_context_window"] == 100_000


def test_llm_keeps_the_rest_of_its_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    places = (".config", "Library/Application Support")
    folders = [tmp_path / place / "io.datasette.llm" for place in places]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "keys.json").write_text("{}")
        (folder / "extra-openai-models.yaml").write_text("[]")
    links = setup_of("llm", tmp_path / "run").links
    assert links.keys() == {"keys.json", "logs.db"}
    assert links["keys.json"].parent in folders


def test_print_shows_what_a_shell_would_run(environment: dict[str, str], models: Path) -> None:
    make(models, "mine")
    done = printed(environment, "claude", "--", "-p", "two words")
    *settings, command = done.stdout.splitlines()
    assert "export ANTHROPIC_BASE_URL=http://127.0.0.1:9" in settings
    assert "export ANTHROPIC_MODEL=mine" in settings
    assert shlex.split(command)[-2:] == ["-p", "two words"]


def test_print_shows_files(environment: dict[str, str], models: Path) -> None:
    make(models, "mine")
    assert '"max_input_tokens": 131072' in printed(environment, "aider").stdout


def test_an_unknown_program_is_told_the_known_ones(environment: dict[str, str]) -> None:
    line = refusal(environment, "launch", "cloud")
    assert all(name in line for name in ("cloud", *PROGRAMS))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_missing_comes_with_its_installation(
    environment: dict[str, str], models: Path, name: str
) -> None:
    make(models, "mine")
    environment["PATH"] = str(models)
    line = refusal(environment, "launch", name)
    assert f"`{PROGRAMS[name].install}` installs it" in line


def test_a_context_too_small_for_the_program_is_refused(
    environment: dict[str, str], models: Path
) -> None:
    make(models, "small", context=8192)
    environment["MLX_SERVER_PORT"] = "9"
    line = refusal(environment, "launch", "claude", "--print")
    assert "small has a context of 8,192 tokens" in line
    assert "64,000 or more" in line


def test_a_context_that_is_short_is_advised_about(
    environment: dict[str, str], models: Path
) -> None:
    make(models, "middling", context=40_000)
    assert "works better with 64,000 or more" in printed(environment, "claude").stderr


def test_several_models_without_a_terminal_must_be_chosen_between(
    environment: dict[str, str], models: Path
) -> None:
    make(models, "one")
    make(models, "other")
    environment["MLX_SERVER_PORT"] = "9"
    assert "--model with one of one, other" in refusal(environment, "launch", "llm", "--print")
    assert "LLM_MODEL=other" in printed(environment, "llm", "--model", "other").stdout


def test_several_models_are_asked_about_on_a_terminal(
    environment: dict[str, str], models: Path
) -> None:
    make(models, "one")
    make(models, "other")
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"7\n2\n")
        done = subprocess.run(
            [*COMMAND, "launch", "llm", "--print"],
            env=environment | {"MLX_SERVER_PORT": "9"},
            stdin=theirs,
            stderr=theirs,
            stdout=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert b"LLM_MODEL=other" in done.stdout


def test_no_model_at_all_is_one_line(environment: dict[str, str]) -> None:
    environment["MLX_SERVER_PORT"] = "9"
    assert "mlx-server pull" in refusal(environment, "launch", "llm", "--print")


def test_a_server_that_was_named_must_be_there(environment: dict[str, str], models: Path) -> None:
    make(models, "mine")
    line = refusal(environment, "launch", "llm", "--print", "--port", "9")
    assert "no mlx-server answers at http://127.0.0.1:9" in line
