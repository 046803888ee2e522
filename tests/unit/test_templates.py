"""Conversations through templates that behave as the published ones."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.schemas.internal import ChatPrompt
from tests.support.templates import PUBLISHED, write_text_side

Message = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("templates")
    for name in PUBLISHED:
        write_text_side(home / name, name)
    return home


@pytest.fixture(scope="module")
def adapters(folders: Path) -> dict[str, Adapter]:
    return {name: load_adapter(folders / name, name) for name in PUBLISHED}


def rendered(adapter: Adapter, messages: list[Message], **options: Any) -> str:
    tokens = adapter.prepare(ChatPrompt(messages, **options), None).tokens
    return adapter.tokenizer.backend.decode(tokens, skip_special_tokens=False)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


TALK = [user("uone"), assistant("aone"), user("utwo")]


@pytest.mark.parametrize("name", PUBLISHED.keys() - {"parts"})
def test_a_usual_conversation_is_rendered_as_transformers_does(
    adapters: dict[str, Adapter], folders: Path, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / name, local_files_only=True)
    wanted = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert rendered(adapters[name], TALK) == wanted


@pytest.mark.parametrize(
    ("name", "thinks"),
    [
        ("gemma4", False),
        ("qwen3.5-small", False),
        ("deepseek-v3.1", False),
        ("deepseek-v3.2", False),
        ("qwen3.5", True),
        ("glm5", True),
        ("nemotron3", True),
    ],
)
def test_a_model_thinks_as_its_template_has_it_unless_the_request_says_otherwise(
    adapters: dict[str, Adapter], name: str, thinks: bool
) -> None:
    def prompt(**variables: Any) -> str:
        return rendered(adapters[name], TALK, template_kwargs=variables)

    by_default = prompt(enable_thinking=thinks)
    otherwise = prompt(enable_thinking=not thinks)
    assert prompt() == by_default != otherwise
    assert prompt(thinking=not thinks) == otherwise


def test_a_budget_of_thinking_reaches_a_template_that_has_one(adapters: dict[str, Adapter]) -> None:
    text = rendered(adapters["seed-oss"], TALK, template_kwargs={"thinking_budget": 512})
    assert "The thinking budget is 512." in text
