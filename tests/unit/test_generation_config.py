"""generation_config.json: recommended sampling, and what a broken one costs: nothing."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mlx_server.models.store.generation import eos_token_ids, own_sampling
from mlx_server.schemas.internal import InferenceRequest
from tests.support.openai import completions_translated, translated
from tests.support.store import make_model

RECOMMENDED = {
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
}


def folder_with(parent: Path, config: object) -> Path:
    folder = make_model(parent / "model", eos_token_id=[3, 4])
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return folder


def test_a_models_own_sampling_is_read(tmp_path: Path) -> None:
    more = {"do_sample": True, "eos_token_id": 7, "max_new_tokens": 3, "presence_penalty": 1.5}
    assert own_sampling(folder_with(tmp_path, RECOMMENDED | more)) == RECOMMENDED


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1e-40}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": None, "top_p": 0.9}, {"top_p": 0.9}),
        *(({"temperature": odd, "min_p": 0.1}, {"min_p": 0.1}) for odd in ("0.7", True, -1, 9, [])),
        *(({"top_k": odd}, {}) for odd in (0.5, -2, 2**40, "20")),
        *(({name: float("nan")}, {}) for name in RECOMMENDED),
        *(({name: float("inf")}, {}) for name in RECOMMENDED),
    ],
    ids=str,
)
def test_what_is_no_setting_is_left_out(
    tmp_path: Path, value: dict[str, Any], expected: dict[str, float]
) -> None:
    assert own_sampling(folder_with(tmp_path, value)) == expected


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00", "[" * 100_000])
def test_a_broken_generation_config_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    folder = folder_with(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        assert own_sampling(folder) == {}
        assert eos_token_ids(folder) == {3, 4}
    [warning] = caplog.messages
    assert "generation_config_ignored" in warning


def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, RECOMMENDED)
    assert own_sampling(folder) == RECOMMENDED
    (folder / "generation_config.json").unlink()
    assert own_sampling(folder) == {}


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({}, set(RECOMMENDED)),
        ({"temperature": None}, set(RECOMMENDED)),
        ({"temperature": 1.0, "top_k": 0}, {"top_p", "min_p", "repetition_penalty"}),
        ({"temperature": 0}, {"top_k", "min_p", "repetition_penalty"}),
        ({"top_p": 0}, {"top_k", "min_p", "repetition_penalty"}),
        ({"top_p": 1.0}, set(RECOMMENDED) - {"top_p"}),
    ],
    ids=lambda value: ",".join(sorted(value)),
)
def test_what_a_request_says_is_not_left_to_the_model(
    asked: dict[str, Any], left: set[str]
) -> None:
    requests: list[InferenceRequest] = [translated(**asked), *completions_translated(**asked)]
    assert all(request.unasked == left for request in requests)
