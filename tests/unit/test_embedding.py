"""What a folder tells of how its model makes vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mlx_server.engine.protocol import Embedding
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.pool.footprint import read_embedding_footprint, read_footprint
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.embedding_files import (
    EmbeddingFiles,
    is_embedding_model,
    read_embedding,
)
from mlx_server.models.store.fetch import fetch
from tests.support.bert import build_tiny_bert, write_modules
from tests.support.hub import Hub, running
from tests.support.store import sources_in
from tests.support.tiny import build_tiny_model

LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
PARTS = "sentence_transformers.models."


def write(folder: Path, pooling: Any, *more: str) -> Path:
    """Files of a model that pools in that way and has these parts after it."""
    modules = [{"type": f"{PARTS}Transformer", "path": ""}]
    modules += [{"type": f"{PARTS}Pooling", "path": "1_Pooling"}]
    modules += [{"type": kind, "path": f"{i}_More"} for i, kind in enumerate(more, 2)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_an_encoder_without_further_files_takes_the_mean(tmp_path: Path) -> None:
    folder = build_tiny_bert(tmp_path / "model", pooling=None)
    assert read_embedding(folder) == EmbeddingFiles(Embedding(["mean"], True), None)


@pytest.mark.parametrize(
    ("pooling", "modes"),
    [
        (LAST, ["last"]),
        ({"pooling_mode": "lasttoken"}, ["last"]),
        ({"pooling_mode": ["mean", "cls"]}, ["cls", "mean"]),
        (LAST | {"pooling_mode_cls_token": True}, ["cls", "last"]),
        ({"pooling_mode_weightedmean_tokens": True, "include_prompt": True}, ["weighted_mean"]),
    ],
)
def test_the_ways_of_pooling_are_those_switched_on(
    tmp_path: Path, pooling: Any, modes: list[str]
) -> None:
    assert read_embedding(write(tmp_path, pooling)).embedding == Embedding(modes, False)


def test_vectors_are_scaled_where_the_files_say_so(tmp_path: Path) -> None:
    newer = "sentence_transformers.sentence_transformer.modules.normalize.Normalize"
    assert read_embedding(write(tmp_path, LAST, newer)).embedding.normalize


@pytest.mark.parametrize(
    ("pooling", "more", "reason"),
    [
        (LAST, f"{PARTS}Dense", "Dense"),
        ({"pooling_mode_attention": True}, "", "attention"),
        ({}, "", "no way of pooling"),
        ([], "", "not a JSON object"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, pooling: Any, more: str, reason: str
) -> None:
    folder = write(tmp_path, pooling, *filter(None, [more]))
    with pytest.raises(ModelLoadFailed, match=reason):
        read_embedding(folder)


def test_a_module_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": "../x"}]))
    with pytest.raises(ModelLoadFailed, match=r"modules\.json"):
        read_embedding(tmp_path)


def test_a_decoder_makes_vectors_only_where_its_folder_says_so(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen")
    assert not is_embedding_model(folder, {"model_type": "qwen3"})
    write_modules(folder, ["lasttoken"], normalize=True)
    assert is_embedding_model(folder, {"model_type": "qwen3"})
    assert read_embedding(folder).embedding == Embedding(["last"], True)


def test_the_catalog_tells_embedding_models_and_what_they_take(tmp_path: Path) -> None:
    build_tiny_bert(tmp_path / "models" / "bert", context=128, longest=100)
    build_tiny_model(tmp_path / "models" / "llama")
    catalog = Catalog(sources_in(tmp_path))
    bert, llama = catalog.find("bert"), catalog.find("llama")
    assert (bert.embeds, bert.context_length) == (True, 100)
    assert not llama.embeds


def test_an_embedding_model_needs_no_caches(tmp_path: Path) -> None:
    folder = build_tiny_bert(tmp_path / "model", context=128, longest=100)
    plain, ours = read_footprint(folder, True), read_embedding_footprint(folder, True, 100)
    assert ours.weights == plain.weights
    assert (ours.kv(1000), ours.context_length) == (0, 100)
    assert ours.working(8) == ours.working(512) > 0


def test_a_pull_takes_the_pooling_along_and_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_tiny_bert(tmp_path / "source")
    files = {
        str(file.relative_to(source)): file.read_bytes()
        for file in source.rglob("*")
        if file.is_file()
    }
    unwanted = {"original/config.json": b"{}", "onnx/1_Pooling/config.json": b"{}"}
    with running(Hub({"tiny/bert": files | unwanted})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        folder = fetch("tiny/bert", sources_in(tmp_path), lambda _: None)
    assert read_embedding(folder) == read_embedding(source)
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        *files
    }
