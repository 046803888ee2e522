"""Removing models: what is ours and nothing else, and never what a server has loaded."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_server.errors import BadRequest
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.locks import ModelLock, write_lock
from mlx_server.models.store.removal import plan_removal, removal_of, remove
from mlx_server.models.store.sources import ModelSources
from tests.support.hub import COMMIT as REAL_COMMIT
from tests.support.store import COMMIT, OLDER, ids, make_model, make_snapshot, sources_in


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> ModelSources:
    return sources_in(tmp_path / "home", model_dirs=[tmp_path / "more"])


def home(sources: ModelSources) -> Path:
    return sources.models_folder.parent


def rm(name: str, sources: ModelSources) -> None:
    remove(removal_of(name, Catalog(sources)), home(sources))


def make_cached(cache: Path, repo: str, commit: str, ref: str = "main") -> Path:
    """A snapshot as the hub's library writes it: links to blobs."""
    snapshot = make_snapshot(cache, repo, commit, ref)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    for file in list(snapshot.iterdir()):
        blob = file.rename(blobs / f"{commit[:4]}-{file.name}")
        file.symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("name", ["one", "org/one"])
def test_a_folder_of_ours_is_removed(sources: ModelSources, name: str) -> None:
    folder = make_model(sources.models_folder / name)
    make_model(sources.models_folder / "two")
    rm(name, sources)
    assert not folder.exists()
    assert ids(sources) == ["two"]


def test_a_cached_repo_is_removed_with_all_its_revisions(
    sources: ModelSources, cache: Path
) -> None:
    make_cached(cache, "org/name", COMMIT)
    make_cached(cache, "org/name", OLDER, ref="v1")
    make_cached(cache, "org/other", COMMIT)
    rm("org/name", sources)
    assert ids(sources) == ["org/other"]
    assert not (cache / "models--org--name").exists()


def test_one_revision_is_removed_alone(sources: ModelSources, cache: Path) -> None:
    make_cached(cache, "org/name", COMMIT)
    make_cached(cache, "org/name", OLDER, ref="v1")
    rm("org/name@v1", sources)
    assert ids(sources) == ["org/name"]
    blobs = (cache / "models--org--name" / "blobs").iterdir()
    assert {blob.name.partition("-")[0] for blob in blobs} == {COMMIT[:4]}


def test_a_repo_with_an_unfinished_update_is_removed_whole(
    sources: ModelSources, cache: Path
) -> None:
    make_cached(cache, "org/name", COMMIT)
    broken = cache / "models--org--name" / "snapshots" / REAL_COMMIT
    broken.mkdir()
    (broken / "model.safetensors").symlink_to("../../blobs/not-here-yet")
    rm("org/name", sources)
    assert not (cache / "models--org--name").exists()


def test_a_folder_of_the_user_is_never_removed(sources: ModelSources, tmp_path: Path) -> None:
    folder = make_model(sources.model_dirs[0] / "theirs")
    with pytest.raises(BadRequest, match="Remove its folder yourself"):
        rm("theirs", sources)
    elsewhere = make_model(tmp_path / "elsewhere" / "mine")
    catalog = Catalog(sources)
    with pytest.raises(BadRequest, match="Remove its folder yourself"):
        plan_removal(catalog.add(str(elsewhere)), sources.models_folder)
    assert folder.exists()
    assert elsewhere.exists()


def test_a_link_out_of_our_folder_is_not_followed(sources: ModelSources, tmp_path: Path) -> None:
    target = make_model(tmp_path / "elsewhere" / "mine")
    sources.models_folder.mkdir(parents=True)
    (sources.models_folder / "link").symlink_to(target)
    with pytest.raises(BadRequest, match="Remove its folder yourself"):
        rm("link", sources)
    assert target.exists()


def test_an_adapter_is_not_removed_with_its_base_in_its_place(sources: ModelSources) -> None:
    base = make_model(sources.models_folder / "one")
    adapter = sources.adapters_folder / "one" / "legal"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(BadRequest, match="adapter"):
        rm("one@legal", sources)
    assert base.exists()
    assert adapter.exists()


def test_a_loaded_model_is_refused_until_it_is_unloaded(sources: ModelSources, cache: Path) -> None:
    for name, folder in (
        ("one", make_model(sources.models_folder / "one")),
        ("org/name", make_cached(cache, "org/name", COMMIT)),
    ):
        lock = ModelLock(home(sources), folder)
        with pytest.raises(BadRequest, match="unload it first"):
            rm(name, sources)
        assert folder.exists()
        lock.release()
        rm(name, sources)
        assert not folder.exists()


def test_a_repo_is_refused_while_any_of_its_revisions_is_loaded(
    sources: ModelSources, cache: Path
) -> None:
    make_cached(cache, "org/name", COMMIT)
    lock = ModelLock(home(sources), make_cached(cache, "org/name", OLDER, ref="v1"))
    with pytest.raises(BadRequest, match="unload it first"):
        rm("org/name", sources)
    assert ids(sources) == ["org/name", "org/name@v1"]
    lock.release()


def test_a_model_that_is_being_pulled_is_refused(sources: ModelSources, cache: Path) -> None:
    make_cached(cache, "org/name", COMMIT)
    with (
        write_lock(cache / "models--org--name"),
        pytest.raises(BadRequest, match="being pulled"),
    ):
        rm("org/name", sources)
    assert ids(sources) == ["org/name"]
