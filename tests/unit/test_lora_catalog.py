"""LoRA adapters in the catalog: `base@adapter` for every base that can be served."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_server.errors import ModelNotFound
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.sources import ModelSources
from tests.support.store import COMMIT, OLDER, ids, make_model, make_snapshot, sources_in


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> ModelSources:
    return sources_in(tmp_path / "home")


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {"num_layers": 1, "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapters.safetensors").write_bytes(b"weights")
    return folder


def test_an_adapter_folder_below_home_is_a_variant_of_its_base(
    sources: ModelSources, cache: Path
) -> None:
    base = make_model(sources.models_folder / "one")
    make_snapshot(cache, "org/two", COMMIT)
    first = make_adapter(sources.adapters_folder / "one" / "legal")
    make_adapter(sources.adapters_folder / "org" / "two" / "poet")
    assert ids(sources) == ["one", "one@legal", "org/two", "org/two@poet"]
    entry = Catalog(sources).find("one@legal")
    assert (entry.path, entry.adapter_path, entry.source) == (base, first, "adapter")
    assert (entry.size, entry.aliases) == (len(b"weights"), ())


def test_an_adapter_named_in_the_settings_is_a_variant_of_its_base(
    sources: ModelSources, tmp_path: Path
) -> None:
    make_model(sources.models_folder / "one")
    sources = replace(
        sources,
        aliases={"uno": "one", "lawyer": "one@legal"},
        adapters={"uno@legal": make_adapter(tmp_path / "anywhere")},
    )
    catalog = Catalog(sources)
    assert catalog.find("one@legal").adapter_path == tmp_path / "anywhere"
    assert catalog.find("lawyer").id == "one@legal"


def test_an_adapter_of_a_path_given_by_the_operator_is_found(
    sources: ModelSources, tmp_path: Path
) -> None:
    sources = replace(sources, adapters={"mine@legal": make_adapter(tmp_path / "anywhere")})
    catalog = Catalog(sources)
    folder = make_model(tmp_path / "elsewhere" / "mine")
    catalog.add(str(folder))
    assert catalog.find("mine@legal").path == folder.resolve()


def test_a_revision_of_the_base_wins_over_an_adapter_of_that_name(
    sources: ModelSources, cache: Path
) -> None:
    make_snapshot(cache, "org/name", COMMIT)
    tagged = make_snapshot(cache, "org/name", OLDER, ref="v1")
    make_adapter(sources.adapters_folder / "org" / "name" / "v1")
    entry = Catalog(sources).find("org/name@v1")
    assert (entry.path, entry.adapter_path) == (tagged, None)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("adapter_config.json", None, r"it has no adapter_config\.json"),
        ("adapter_config.json", b"{", r"adapter_config\.json of legal could not be read"),
        ("adapter_config.json", b"[]", r"not a JSON object\.$"),
        ("adapters.safetensors", None, r"it has no adapters\.safetensors"),
    ],
)
def test_a_broken_adapter_is_not_listed_and_the_error_says_why(
    sources: ModelSources, file: str, content: bytes | None, reason: str
) -> None:
    make_model(sources.models_folder / "one")
    folder = make_adapter(sources.adapters_folder / "one" / "legal")
    make_adapter(sources.adapters_folder / "one" / "good")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert ids(sources) == ["one", "one@good"]
    with pytest.raises(ModelNotFound, match=reason):
        Catalog(sources).find("one@legal")


def test_an_adapter_without_its_base_says_what_is_missing(sources: ModelSources) -> None:
    make_adapter(sources.adapters_folder / "one" / "legal")
    legal = sources.adapters_folder / "one" / "legal"
    sources = replace(sources, adapters={"no-at-sign": legal})
    assert ids(sources) == []
    with pytest.raises(ModelNotFound, match="there is no model 'one'"):
        Catalog(sources).find("one@legal")


def test_an_adapter_goes_with_its_base(sources: ModelSources) -> None:
    folder = make_model(sources.models_folder / "one")
    make_adapter(sources.adapters_folder / "one" / "legal")
    catalog = Catalog(sources)
    assert len(catalog.entries()) == 2
    shutil.rmtree(folder)
    catalog.refresh()
    assert catalog.entries() == []


def test_stray_files_and_links_among_adapters_do_no_harm(sources: ModelSources) -> None:
    make_model(sources.models_folder / "one")
    make_adapter(sources.adapters_folder / "one" / "legal")
    (sources.adapters_folder / ".DS_Store").write_bytes(b"")
    (sources.adapters_folder / "one" / "notes.txt").write_bytes(b"")
    (sources.adapters_folder / "loop").symlink_to(sources.adapters_folder)
    assert ids(sources) == ["one", "one@legal"]
