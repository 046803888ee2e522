"""Documentation that is made from the code is what the code says."""

import runpy
from pathlib import Path

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from mlx_server.config import Settings
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


def test_the_tables_of_openais_parameters_are_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "openai_table.py"))
    text = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    for name in script["REQUESTS"]:
        assert all(marker in text for marker in script["markers"](name))
    assert text == script["updated"](text), "run `python scripts/openai_table.py`"


@pytest.mark.parametrize(
    ("request_model", "known"),
    [
        (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
        (CompletionRequest, text_params.CompletionCreateParamsStreaming),
        (ResponseRequest, response_params.ResponseCreateParamsBase),
    ],
)
def test_every_parameter_that_openai_knows_has_one_fate(
    request_model: type[RequestObject], known: type
) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "openai_table.py"))
    names = [name for name, _, _ in script["rows"](request_model)]
    assert known.__annotations__.keys() - set(names) == set()
    assert len(names) == len(set(names))
