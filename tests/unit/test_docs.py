"""Documentation that is made from the code is what the code says."""

import runpy
from pathlib import Path

import pytest
from anthropic.types import message_create_params as message_params
from anthropic.types.beta import message_create_params as beta_message_params
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from mlx_server.config import Settings
from mlx_server.schemas.anthropic.requests import MessagesRequest
from mlx_server.schemas.objects import RequestObject
from mlx_server.schemas.openai.chat import ChatCompletionRequest
from mlx_server.schemas.openai.completions import CompletionRequest
from mlx_server.schemas.openai.responses.requests import ResponseRequest

ROOT = Path(__file__).parent.parent.parent


def test_the_table_of_settings_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert script["BEGIN"] in text
    assert script["END"] in text
    assert text == script["updated"](text), "run `python scripts/settings_table.py`"
    assert all(f"| `{name}` |" in text for name in Settings.model_fields)


def test_every_setting_says_what_it_does() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


SCRIPT = ROOT / "scripts" / "parameter_tables.py"


@pytest.mark.parametrize("document", ["openai.md", "anthropic.md"])
def test_the_tables_of_parameters_are_fresh(document: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    requests = script["DOCUMENTS"][document]
    for name in requests:
        assert all(marker in text for marker in script["markers"](name))
    assert text == script["updated"](text, requests), "run `python scripts/parameter_tables.py`"


@pytest.mark.parametrize(
    ("request_model", "known"),
    [
        (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
        (CompletionRequest, text_params.CompletionCreateParamsStreaming),
        (ResponseRequest, response_params.ResponseCreateParamsBase),
        (MessagesRequest, message_params.MessageCreateParamsBase),
        (MessagesRequest, beta_message_params.MessageCreateParamsBase),
    ],
)
def test_every_parameter_that_the_sdk_knows_has_one_fate(
    request_model: type[RequestObject], known: type
) -> None:
    script = runpy.run_path(str(SCRIPT))
    names = [name for name, _, _ in script["rows"](request_model)]
    assert known.__annotations__.keys() - set(names) == set()
    assert len(names) == len(set(names))
