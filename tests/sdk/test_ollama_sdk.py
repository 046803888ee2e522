"""What users of Ollama's client rely on: chats, generations, tools, thinking, vectors, models."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from ollama import AsyncClient, Client, Message
from pydantic import BaseModel, Field

from tests.support.bert import build_tiny_bert
from tests.support.hub import Hub, running
from tests.support.ollama import assert_refused, check_order, lines_of, said
from tests.support.outputs import hermes
from tests.support.sdk import API_KEY
from tests.support.server import CHAT, Server, serving
from tests.support.tiny import FAMILIES, build_scripted_model, build_tiny_model

MODEL, THINKER, CALLER, EMBEDDER = "tiny", "thinker", "caller", "embedder"
REPO = "tiny/pulled"
CONTEXT = 2048
LONGEST = 64
WIDTH = 32
ADMIN_KEY = "an-admin-key"
PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]
BRIEF: Any = {"temperature": 0, "num_predict": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models of all kinds, names for them, and one to pull."""
    home = tmp_path_factory.mktemp("ollama")
    models = home / "models"
    tiny = build_tiny_model(models / MODEL, context=CONTEXT)
    qwen = FAMILIES["qwen"]
    marks = [mark for mark in ("<think>", "</think>") if mark not in qwen.plain_tokens]
    build_scripted_model(
        models / THINKER,
        "<think>Hm, what is it.</think>Paris, of course",
        family="qwen",
        template=f"{{#- <think></think> -#}}{qwen.template}",
        extra_tokens=marks,
    )
    script = "I shall look.\n\n" + hermes("weather", '{"city": "Rome", "days": 3}')
    # The prompt must not end in a token of the script.
    build_scripted_model(
        models / CALLER, script, family="qwen", template=f"{qwen.template}{{{{- 'A' }}}}"
    )
    build_tiny_bert(models / EMBEDDER, hidden=WIDTH, longest=LONGEST)
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    with running(Hub({REPO: files})) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        with serving(
            home,
            "--model",
            MODEL,
            api_keys=[API_KEY],
            admin_keys=[ADMIN_KEY],
            aliases={"default": MODEL, "gpt-*": MODEL, "gpt-4*": EMBEDDER, "gone-*": "no/such"},
        ) as server:
            yield server


def client_of(server: Server, key: str) -> Client:
    return Client(server.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False)


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    """The official client, as a user sets it up."""
    return client_of(server, API_KEY)


@pytest.fixture(scope="module")
def admin(server: Server) -> Client:
    return client_of(server, ADMIN_KEY)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    key = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=server.url, headers=key, timeout=60, trust_env=False) as client:
        yield client


# chats and generations


def test_a_stream_folds_to_the_whole_answer(client: Client, http: httpx.Client) -> None:
    whole = client.chat(MODEL, PARIS, options=BRIEF)
    parts = list(client.chat(MODEL, PARIS, options=BRIEF, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 8)
    asked = {"model": MODEL, "messages": PARIS, "options": BRIEF}
    check_order(lines_of(http.post("/api/chat", json=asked)), ollama.ChatResponse)
    asked = {"model": MODEL, "prompt": "Once", "options": BRIEF}
    check_order(lines_of(http.post("/api/generate", json=asked)), ollama.GenerateResponse)


async def test_the_asynchronous_client_is_answered_the_same(server: Server) -> None:
    key = {"Authorization": f"Bearer {API_KEY}"}
    client = AsyncClient(server.url, headers=key, trust_env=False)
    whole, again = await asyncio.gather(
        client.generate(MODEL, "Once upon", options=BRIEF),
        client.generate(MODEL, "Once upon", options=BRIEF),
    )
    streamed = await client.generate(MODEL, "Once upon", options=BRIEF, stream=True)
    said = "".join([part.response or "" async for part in streamed])
    assert whole.response == again.response == said


def test_chats_and_chat_completions_say_the_same_and_count_the_same(
    client: Client, http: httpx.Client
) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, *PARIS]
    ours = client.chat(MODEL, conversation, options={"temperature": 0, "num_predict": 32})
    prompt = PARIS[0]["content"]
    generated = client.generate(
        MODEL, prompt, system="Be brief.", options={"temperature": 0, "num_predict": 32}
    )
    body = {"model": MODEL, "messages": conversation, "temperature": 0, "max_tokens": 32}
    theirs = http.post(CHAT, json=body).json()
    text, usage = theirs["choices"][0]["message"]["content"], theirs["usage"]
    assert ours.message.content == generated.response == text
    for one in (ours, generated):
        counts = (one.prompt_eval_count, one.eval_count)
        assert counts == (usage["prompt_tokens"], usage["completion_tokens"])


def test_a_raw_prompt_is_continued_as_completions_do(client: Client, http: httpx.Client) -> None:
    ours = client.generate(MODEL, "Once upon a time", raw=True, options=BRIEF)
    body = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}
    theirs = http.post("/v1/completions", json=body).json()
    assert ours.response == theirs["choices"][0]["text"]
    assert ours.prompt_eval_count == theirs["usage"]["prompt_tokens"]


def test_options_are_kept_to(client: Client) -> None:
    said = client.generate(MODEL, "Once", options=BRIEF).response
    assert said is not None
    stop = said[2:4]
    stopped = client.generate(MODEL, "Once", options={**BRIEF, "stop": ["no such", stop]})
    assert (stopped.response, stopped.done_reason) == (said[: said.index(stop)], "stop")
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "num_predict": 16}
    seeded = [client.generate(MODEL, "Once", options={**hot, "seed": s}) for s in (5, 5, 6)]
    assert seeded[0].response == seeded[1].response != seeded[2].response
    odd = {**BRIEF, "num_ctx": 4096, "mirostat": 1, "num_gpu": 9, "not_yet_known": [1]}
    assert client.generate(MODEL, "Once", options=odd).response == said
    assert client.generate(MODEL, "Once", options={"num_predict": 3.0}).eval_count == 3


def test_an_answer_keeps_to_its_format(client: Client) -> None:
    class Country(BaseModel, extra="forbid"):
        name: str = Field(max_length=10)
        size: int = Field(ge=0, le=99)

    schema: Any = Country.model_json_schema()
    asked: Any = {"options": {"temperature": 0, "num_predict": 200}}
    chatted = client.chat(MODEL, PARIS, format=schema, **asked)
    assert Country.model_validate_json(chatted.message.content or "")
    assert Country.model_validate_json(
        client.generate(MODEL, "A country", format=schema, **asked).response or ""
    )
    begun = client.generate(MODEL, "A country", format="json", options=BRIEF).response
    assert (begun or "").lstrip().startswith("{")


def test_log_probabilities_come_with_the_text(client: Client) -> None:
    asked: Any = {"logprobs": True, "top_logprobs": 2, "options": BRIEF}
    whole = client.chat(MODEL, PARIS, **asked)
    assert whole.logprobs is not None
    assert len(whole.logprobs) == 8
    assert all(len(entry.top_logprobs or ()) == 2 for entry in whole.logprobs)
    streamed = client.generate(MODEL, "Once", stream=True, **asked)
    entries = [entry for part in streamed for entry in part.logprobs or ()]
    assert len(entries) == 8


# thinking and tools


@pytest.mark.parametrize("think", [None, True, "low", "max"])
def test_thinking_is_told_apart_from_the_answer(client: Client, think: Any) -> None:
    chatted = client.chat(THINKER, PARIS, think=think)
    assert chatted.message.thinking == "Hm, what is it."
    assert chatted.message.content == "Paris, of course"
    parts = list(client.generate(THINKER, "Where?", think=think, stream=True))
    assert "".join(part.thinking or "" for part in parts) == "Hm, what is it."
    assert "".join(part.response or "" for part in parts) == "Paris, of course"


def test_thinking_asked_of_a_model_that_does_not_is_refused(client: Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
        client.chat(MODEL, PARIS, think=True)
    assert refused.value.status_code == 400
    assert client.chat(MODEL, PARIS, think=False, options=BRIEF).eval_count == 8


def weather(city: str, days: int) -> str:
    """Tell the weather.

    Args:
        city: Where.
        days: How many.

    Returns:
        A text.
    """
    return f"sunny in {city} for {days} days"


def test_a_tool_is_called_and_its_result_answered(client: Client) -> None:
    whole = client.chat(CALLER, PARIS, tools=[weather])
    parts = list(client.chat(CALLER, PARIS, tools=[weather], stream=True))
    told = [call for part in parts for call in part.message.tool_calls or ()]
    assert whole.message.tool_calls is not None
    for [call] in (whole.message.tool_calls, told):
        assert call.function.name == "weather"
        assert call.function.arguments == {"city": "Rome", "days": 3}
    assert (whole.message.content or "").strip() == "I shall look."
    assert whole.done_reason == parts[-1].done_reason == "stop"
    result = weather(**whole.message.tool_calls[0].function.arguments)
    conversation = [
        *PARIS,
        whole.message,
        Message(role="tool", content=result, tool_name="weather"),
    ]
    again = client.chat(MODEL, conversation, tools=[weather], options=BRIEF)
    assert again.eval_count == 8


def test_a_call_that_is_cut_off_is_none(client: Client) -> None:
    whole = client.chat(CALLER, PARIS, tools=[weather], options={"num_predict": 12})
    assert (whole.message.tool_calls, whole.done_reason) == (None, "length")


# vectors


def test_texts_become_vectors(client: Client, http: httpx.Client) -> None:
    texts = ["The quick brown fox", "A server answers"]
    ours = client.embed(EMBEDDER, texts)
    theirs = http.post("/v1/embeddings", json={"model": EMBEDDER, "input": texts}).json()
    for vector, other in zip(ours.embeddings, theirs["data"], strict=True):
        assert vector == pytest.approx(other["embedding"], abs=1e-5)
    assert ours.prompt_eval_count == theirs["usage"]["prompt_tokens"]
    assert (ours.total_duration or 0) >= (ours.load_duration or 0) >= 0
    alone = client.embed(EMBEDDER, texts[0], dimensions=8)
    assert len(alone.embeddings[0]) == 8
    assert client.embeddings(EMBEDDER, texts[0]).embedding == pytest.approx(
        ours.embeddings[0], abs=1e-5
    )
    assert client.embed(EMBEDDER, []).embeddings == []


def test_a_text_beyond_the_context_is_cut_unless_that_is_forbidden(client: Client) -> None:
    long = "fox " * 500
    made = client.embed(EMBEDDER, [long, "fox"])
    assert made.prompt_eval_count == LONGEST + 3
    assert client.embed(EMBEDDER, long).embeddings[0] == pytest.approx(made.embeddings[0], abs=1e-5)
    with pytest.raises(ollama.ResponseError) as refused:
        client.embed(EMBEDDER, long, truncate=False)
    assert refused.value.status_code == 400


# models


def test_models_are_listed_by_each_of_their_names(client: Client, http: httpx.Client) -> None:
    listed = {model.model: model for model in client.list().models}
    expected = {f"{name}:latest" for name in (MODEL, THINKER, CALLER, EMBEDDER, "default")}
    assert set(listed) == expected
    assert listed["default:latest"].digest == listed[f"{MODEL}:latest"].digest
    assert len(listed[f"{MODEL}:latest"].digest or "") == 64
    raw = {one["name"]: one for one in http.get("/api/tags").json()["models"]}
    assert raw[f"{MODEL}:latest"]["context_length"] == CONTEXT
    for name in listed:
        assert client.show(name or "").capabilities == raw[name]["capabilities"]  # type: ignore[index]
    openai = {one["id"]: one for one in http.get("/v1/models").json()["data"]}
    assert set(openai[MODEL]["aliases"]) == {"default", "gpt-*"}


def test_a_model_is_described(client: Client) -> None:
    shown = client.show(MODEL)
    assert shown.modelinfo is not None
    arch = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{arch}.context_length"] == CONTEXT
    assert shown.modelinfo["general.parameter_count"] > 1000
    assert shown.template == FAMILIES["llama"].template
    assert shown.details is not None
    assert (shown.details.family, shown.details.quantization_level) == (arch, "F32")
    assert shown.capabilities == ["completion", "tools"]
    assert client.show(THINKER).capabilities == ["completion", "tools", "thinking"]
    assert client.show(EMBEDDER).capabilities == ["embedding"]


@pytest.mark.parametrize("name", ["gpt-oss:20b", "default", "default:latest", f"{MODEL}:latest"])
def test_aliases_patterns_and_ollamas_tag_name_models_in_every_protocol(
    client: Client, http: httpx.Client, name: str
) -> None:
    ours = client.chat(name, PARIS, options=BRIEF)
    assert (ours.model, ours.eval_count) == (name, 8)
    body = {"model": name, "messages": PARIS, "max_tokens": 4}
    assert http.post(CHAT, json=body).json()["model"] == MODEL
    assert http.post("/v1/messages", json=body).json()["model"] == MODEL
    assert http.get(f"/v1/models/{name}").json()["id"] == MODEL


def test_the_longest_pattern_counts_and_a_name_that_leads_nowhere_is_refused(
    client: Client, http: httpx.Client
) -> None:
    assert len(client.embed("gpt-4-embed", "fox").embeddings[0]) == WIDTH
    unnamed = http.post("/api/generate", json={"prompt": "Once", "options": BRIEF, "stream": False})
    assert unnamed.json()["model"] == MODEL
    for name in ("gone-x", "other", f"{MODEL}:8b"):
        answer = http.post("/api/generate", json={"model": name, "prompt": "Once"})
        assert name in assert_refused(answer, 404)


def test_models_are_loaded_and_unloaded_without_a_question(client: Client) -> None:
    def held() -> dict[str | None, Any]:
        return {model.model: model for model in client.ps().models}

    loaded = client.generate(THINKER, keep_alive=-1)
    assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
    state = held()[f"{THINKER}:latest"]
    assert state.expires_at.year > 2200
    assert state.context_length == CONTEXT
    client.chat(THINKER, keep_alive="90s")
    assert held()[f"{THINKER}:latest"].expires_at.year < 2200
    unloaded = client.chat(THINKER, keep_alive=0)
    assert unloaded.done_reason == "unload"
    assert f"{THINKER}:latest" not in held()
    # What is not there is not loaded to be let go.
    assert client.generate(THINKER, keep_alive=0).done_reason == "unload"
    client.generate(THINKER, "Where?", keep_alive=0)
    assert f"{THINKER}:latest" not in held()


def test_a_model_is_pulled_with_progress_and_deleted_by_administrators(
    client: Client, admin: Client
) -> None:
    for forbidden in (lambda: client.pull(REPO), lambda: client.delete(REPO)):
        with pytest.raises(ollama.ResponseError) as refused:
            forbidden()
        assert refused.value.status_code == 403
    steps = list(admin.pull(f"{REPO}:latest", stream=True))
    assert steps[-1].status == "success"
    [last] = [step for step in steps if step.total][-1:]
    assert (last.completed or 0) <= (last.total or 0)
    assert (last.digest or "").startswith("sha256:")
    assert admin.pull(REPO).status == "success"
    assert client.generate(REPO, "Once", options=BRIEF, keep_alive=0).eval_count == 8
    while any(model.model == f"{REPO}:latest" for model in client.ps().models):
        pass
    _deleted(admin)
    with pytest.raises(ollama.ResponseError) as missing:
        admin.delete(REPO)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="no/such"):
        list(admin.pull("no/such", stream=True))


def _deleted(admin: Client) -> None:
    """Once its engine has ended, which has the folder locked."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert admin.delete(REPO).status == "success"
        except ollama.ResponseError as error:
            if "loaded" not in str(error):
                raise
        else:
            return
    raise AssertionError("it was never unloaded")


def test_programs_that_look_for_an_ollama_find_one(server: Server, http: httpx.Client) -> None:
    found = httpx.get(server.url, trust_env=False)
    assert (found.status_code, found.text) == (200, "Ollama is running")
    assert httpx.head(server.url, trust_env=False).status_code == 200
    version = http.get("/api/version").json()["version"]
    assert [int(part) for part in version.split(".")] >= [0, 13, 4]
    assert http.head("/api/tags").status_code == http.head("/api/version").status_code == 200


def test_what_is_not_done_here_is_said(client: Client, http: httpx.Client) -> None:
    for path in ("/api/create", "/api/copy", "/api/push", "/api/blobs/sha256:0"):
        assert "aliases" in assert_refused(http.post(path, json={}), 400)
    with pytest.raises(ollama.ResponseError, match="text only"):
        client.generate(MODEL, "What is this?", images=[b"123"])
    with pytest.raises(ollama.ResponseError, match="suffix"):
        client.generate(MODEL, "def f(", suffix="return 1")


# refusals

TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD_CHATS: list[dict[str, Any]] = [
    {"messages": "Hello"},
    {"messages": {}},
    {"messages": ["Hello"]},
    {"messages": [{"content": "Hello"}]},
    {"messages": [{"role": "robot", "content": "Hello"}]},
    {"messages": [{"role": 1, "content": "Hello"}]},
    {"messages": [{"role": "user", "content": 1}]},
    {"messages": [{"role": "user", "content": ["Hello"]}]},
    {"messages": [{"role": "user", "content": "?", "images": ["aGk="]}]},
    {"messages": [{"role": "user", "content": "?", "tool_calls": [{"function": {"name": "f"}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
    {
        "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}
        ]
    },
    {"messages": [{"role": "tool", "content": "x", "tool_name": 1}]},
    {"model": 1},
    {"model": ["tiny"]},
    {"model": "no-such-model"},
    {"model": EMBEDDER},
    {"stream": "yes"},
    {"format": "xml"},
    {"format": 1},
    {"format": ["json"]},
    {"format": {"type": "no-such-type"}},
    {"format": {"type": "string", "pattern": "("}},
    {"think": "very"},
    {"think": 1},
    {"think": True},
    {"keep_alive": "soon"},
    {"keep_alive": [1]},
    {"keep_alive": 1e12},
    {"tools": "f"},
    {"tools": [1]},
    {"tools": [{}]},
    {"tools": [{**TOOL, "type": "web_search"}]},
    {"tools": [TOOL, TOOL]},
    {"tools": [{"type": "function", "function": {"name": ""}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
    {"logprobs": "yes"},
    {"logprobs": True, "top_logprobs": 21},
    {"top_logprobs": -1},
    {"options": []},
    {"options": "temperature=1"},
    {"options": {"temperature": "hot"}},
    {"options": {"temperature": -1}},
    {"options": {"temperature": 1e9}},
    {"options": {"top_p": 2}},
    {"options": {"top_k": 1.5}},
    {"options": {"min_p": -0.1}},
    {"options": {"num_predict": "many"}},
    {"options": {"num_predict": -3}},
    {"options": {"repeat_penalty": 0}},
    {"options": {"presence_penalty": 3}},
    {"options": {"frequency_penalty": "a"}},
    {"options": {"seed": "s"}},
    {"options": {"seed": 2**64}},
    {"options": {"stop": 1}},
    {"options": {"stop": [1]}},
]
BAD_BODIES: list[tuple[str, Any]] = [
    *(
        ("/api/generate", body)
        for body in (
            {"prompt": 1},
            {"prompt": ["a"]},
            {"prompt": "a", "images": ["aGk="]},
            {"prompt": "a", "suffix": "b"},
            {"prompt": "a", "template": "{{ .Prompt }}"},
            {"prompt": "a", "context": [1, 2]},
            {"prompt": "a", "raw": "yes"},
            {"prompt": "a", "raw": True, "system": "b"},
            {"prompt": "a " * 4000},
        )
    ),
    ("/api/embed", {"model": EMBEDDER, "input": 1}),
    ("/api/embed", {"model": EMBEDDER, "input": [1]}),
    ("/api/embed", {"model": EMBEDDER, "input": "a", "dimensions": WIDTH + 1}),
    ("/api/embed", {"model": MODEL, "input": "a"}),
    ("/api/embeddings", {"model": EMBEDDER, "prompt": ["a"]}),
    ("/api/show", {"model": ""}),
    ("/api/show", {"model": "no-such-model"}),
    ("/api/chat", b"{"),
    ("/api/chat", b"[]"),
    ("/api/chat", b""),
]


@pytest.mark.parametrize("bad", BAD_CHATS, ids=str)
def test_a_bad_chat_is_refused_in_ollamas_shape(http: httpx.Client, bad: dict[str, Any]) -> None:
    answer = http.post("/api/chat", json={"model": MODEL, "messages": PARIS, **bad})
    assert_refused(answer, 404 if bad.get("model") == "no-such-model" else 400)


@pytest.mark.parametrize(("path", "bad"), BAD_BODIES, ids=lambda one: str(one)[:60])
def test_a_bad_body_is_refused_in_ollamas_shape(http: httpx.Client, path: str, bad: Any) -> None:
    if isinstance(bad, bytes):
        assert_refused(http.post(path, content=bad), 400)
        return
    answer = http.post(path, json={"model": MODEL, **bad})
    assert_refused(answer, 404 if bad.get("model") == "no-such-model" else 400)


def test_other_refusals_have_ollamas_shape(server: Server, http: httpx.Client) -> None:
    assert_refused(httpx.get(f"{server.url}/api/tags", trust_env=False), 401)
    assert_refused(http.get("/api/nothing"), 404)
    assert_refused(http.get("/api/chat"), 405)
    foreign = {"Host": "evil.example"}
    assert_refused(http.get("/api/tags", headers=foreign), 400)


def test_half_a_turn_is_gone_on_with(client: Client) -> None:
    begun = [*PARIS, {"role": "assistant", "content": "It is"}]
    more = client.chat(MODEL, begun, options=BRIEF)
    assert more.eval_count == 8
    assert said(more.model_dump())[0] is not None
