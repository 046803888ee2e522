"""One server over folders as people have them: each good model is served, each other told of."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import CHAT, HELLO, TEXT, Server, serving
from tests.support.spm import write_sentencepiece
from tests.support.store import make_model
from tests.support.tiny import build_tiny_model

SAMPLING = {"temperature": 0.7, "top_k": 1, "top_p": 0.9}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("folders")
    own = build_tiny_model(parent / "own", template=None)
    (own / "generation_config.json").write_text(json.dumps(SAMPLING | {"min_p": "odd"}))
    (own / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    pieces = build_tiny_model(parent / "pieces", "mistral")
    write_sentencepiece(pieces)
    (pieces / "generation_config.json").write_text("[")
    make_model(parent / "whisper", model_type="whisper")
    shards = make_model(parent / "shards")
    (shards / "model.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    make_model(parent / "line\nbreak")
    (parent / "dangling").symlink_to("nowhere")
    (parent / "loop").symlink_to("loop")
    try:
        make_model(parent / "caf\udce9")
    except OSError:
        assert not (parent / "caf\udce9").exists()  # a file system that takes no such name
    return parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    loaded = ("--model", "own", "--model", "pieces")
    with serving(home, "--model-dir", str(folders), *loaded, context_length=1024) as running:
        yield running


def asked(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_odd_folders_hide_no_model(client: httpx.Client) -> None:
    assert client.get("/ready").status_code == 200
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["line\nbreak", "own", "pieces"]
    shown = [model["id"] for model in client.get("/admin/models").json()["models"]]
    assert shown == listed


@pytest.mark.parametrize(
    ("name", "why"),
    [("whisper", "its type, whisper, is none"), ("shards", "it lacks model-00002-of-00002")],
)
def test_what_cannot_be_served_says_why(client: httpx.Client, name: str, why: str) -> None:
    for answer in (
        client.post(CHAT, json={"model": name, "messages": HELLO}),
        client.get(f"/v1/models/{name}"),
    ):
        assert answer.status_code == 404
        assert why in answer.json()["error"]["message"]


def test_the_models_own_sampling_holds_where_the_request_is_silent(client: httpx.Client) -> None:
    described = client.get("/v1/models/own").json()
    assert described["default_sampling"] == SAMPLING
    assert described["context_length"] == 1024  # as the setting caps it
    silent = {"model": "own", "prompt": "The", "max_tokens": 12, "ignore_eos": True}
    greedy = asked(client, TEXT, **silent, temperature=0)["text"]
    assert {asked(client, TEXT, **silent)["text"] for _ in range(3)} == {greedy}
    loud = silent | {"temperature": 1, "top_k": 0, "top_p": 1}
    assert len({asked(client, TEXT, **loud)["text"] for _ in range(3)}) > 1


def test_a_template_that_only_the_processor_has_makes_a_model_chat(client: httpx.Client) -> None:
    assert client.get("/v1/models/own").json()["capabilities"]["chat"]
    assert asked(client, CHAT, model="own", messages=HELLO, max_tokens=3)["message"]["content"]


@pytest.mark.parametrize(
    "form",
    [
        {"guided_choice": ["yes", "no"]},
        {"guided_regex": "[a-z]{3}"},
        {"response_format": {"type": "json_object"}, "max_tokens": 200},
        {"tools": [TOOL], "tool_choice": "required"},
    ],
    ids=lambda form: next(iter(form)),
)
def test_a_model_with_tokenizer_model_alone_can_be_bound(
    client: httpx.Client, form: dict[str, Any]
) -> None:
    """And its generation_config.json is broken."""
    answer = asked(client, CHAT, **{"model": "pieces", "messages": HELLO, "max_tokens": 60} | form)
    message = answer["message"]
    match next(iter(form)):
        case "guided_choice":
            assert message["content"] in ("yes", "no")
        case "guided_regex":
            assert len(message["content"]) == 3
        case "response_format" if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(message["content"]), dict)
        case "tools" if answer["finish_reason"] == "tool_calls":
            assert message["tool_calls"][0]["function"]["name"] == "now"
