"""What files tell of a model, against what is known once its text side is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_server.models.store.capabilities import read_capabilities
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.styles.json_calls import GENERIC
from tests.support.tiny import FAMILIES, build_tiny_model

THINKS = "{% if enable_thinking %}<think>{% endif %}</think>{{ messages[0]['content'] }}"


def entry_of(folder: Path) -> ModelEntry:
    return ModelEntry(id=folder.name, path=folder, source="folder")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_tell_what_a_loaded_model_knows(tmp_path: Path, family: str) -> None:
    for name, template in (("own", FAMILIES[family].template), ("thinks", THINKS), ("none", None)):
        folder = build_tiny_model(tmp_path / name, family, template=template)
        told = read_capabilities(entry_of(folder))
        known = load_adapter(folder, name)
        chats = known.style is not None
        assert told is not None
        assert (told.chat, told.tools) == (chats, chats)
        assert told.reasoning == (chats and known.syntax.reasoning is not None)
        assert told.native_tools == (chats and known.style is not GENERIC)
        assert told.structured_output
        assert not told.embeddings


def test_a_template_is_found_wherever_it_stands_and_when_it_changes(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "bare", template=None)
    before = read_capabilities(entry_of(folder))
    (folder / "chat_template.jinja").write_text("{{ tools }}", encoding="utf-8")
    after = read_capabilities(entry_of(folder))
    assert before is not None
    assert after is not None
    assert (before.chat, after.chat, after.native_tools) == (False, True, True)
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{{ tools }}"}]
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"chat_template": named})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    assert read_capabilities(entry_of(folder)) == after


def test_nothing_is_told_of_what_cannot_be_read(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "broken")
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert read_capabilities(entry_of(folder)) is None
    assert read_capabilities(replace(entry_of(folder), path=None)) is None


def test_an_embedding_model_does_nothing_else(tmp_path: Path) -> None:
    told = read_capabilities(replace(entry_of(tmp_path), embeds=True))
    assert told is not None
    assert told.embeddings
    assert not any((told.chat, told.tools, told.structured_output))
