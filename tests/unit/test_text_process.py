"""The front and a real text process: prompts, calls and vocabularies across the border."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mlx_server.errors import BadRequest, ContextLengthExceeded, ModelLoadFailed
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.client import ModelText, TextProcess
from mlx_server.schemas.internal import ChatPrompt, Constraint, TextPrompt, TokenPrompt, ToolUse
from tests.support.tiny import build_tiny_model

YES = Constraint("choice", ["yes"], "response_format")
BROKEN = Constraint("regex", "[", "response_format")
TOOLS = [{"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("headers"), "mistral-headers")


@pytest.fixture(scope="module")
async def process() -> AsyncIterator[TextProcess]:
    process = TextProcess(request_seconds=60)
    yield process
    await process.kill()


@pytest.fixture(scope="module")
async def text(process: TextProcess, folder: Path) -> ModelText:
    return await process.open(folder, "tiny", trust_remote_code=False)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Adapter:
    """The same text side in this process."""
    return load_adapter(folder, "tiny")


def user(content: Any, **options: Any) -> ChatPrompt:
    return ChatPrompt([{"role": "user", "content": content}], **options)


PROMPTS = [
    user("Hi"),
    user("Hi", tools=TOOLS, use=ToolUse(TOOLS, "named", "stop", parallel=False)),
    user("Hi", thinking_budget=3, template_kwargs={"x": 1}),
    ChatPrompt(
        [*user("Hi").messages, {"role": "assistant", "content": "[THINK]Hm"}], None, {}, True
    ),
    TextPrompt("Hi"),
    TokenPrompt([1, 2, 3]),
]


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_the_front_gets_what_the_adapter_prepares(
    text: ModelText, adapter: Adapter, prompt: Any
) -> None:
    for constraint in (None, YES):
        prepared = await text.prepare(prompt, constraint, limit=1000)
        assert prepared == adapter.prepare(prompt, constraint)
        assert prepared.tokens
        assert prepared.grammar or constraint is None


async def test_prompts_are_made_stable_where_the_settings_say_so(
    text: ModelText, folder: Path
) -> None:
    changing = {"role": "system", "content": "x-a-billing-header: cch=1;\nBe kind."}
    settled = ChatPrompt([changing | {"content": "Be kind."}, *user("Hi").messages])
    prompt = ChatPrompt([changing, *user("Hi").messages])
    stable = TextProcess(request_seconds=60, stable_prompts=True)
    try:
        other = await stable.open(folder, "tiny", trust_remote_code=False)
        made = await other.prepare(prompt, None, limit=1000)
    finally:
        await stable.kill()
    assert made == await text.prepare(settled, None, limit=1000)
    assert made != await text.prepare(prompt, None, limit=1000)


@pytest.mark.parametrize("prompt", [user("Hi"), TextPrompt("Hi"), TokenPrompt([1, 2, 3])])
async def test_a_refusal_crosses_the_border_with_its_kind_and_parameter(
    text: ModelText, prompt: Any
) -> None:
    with pytest.raises(BadRequest) as refused:
        await text.prepare(prompt, BROKEN, limit=1000)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("prompt", "param"), [(user("Hi " * 9000), "messages"), (TextPrompt("Hi " * 9000), "prompt")]
)
async def test_a_prompt_far_beyond_the_limit_is_refused_by_its_parameter(
    text: ModelText, prompt: Any, param: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as refused:
        await text.prepare(prompt, None, limit=10)
    assert refused.value.param == param


@pytest.mark.parametrize("value", [2**70, [[]] * 2 + [{"a": -(2**70)}]])
async def test_a_value_that_no_message_can_carry_is_the_clients_error(
    text: ModelText, value: Any
) -> None:
    with pytest.raises(BadRequest, match="out of range"):
        await text.prepare(user("Hi", template_kwargs={"x": value}), None, limit=1000)


async def test_the_front_knows_the_vocabulary_and_sees_the_markers_of_calls(
    text: ModelText, adapter: Adapter
) -> None:
    assert (text.stop_tokens, text.syntax) == (adapter.stop_tokens, adapter.syntax)
    for token in range(adapter.tokenizer.size):
        assert text.token_bytes(token) == adapter.tokenizer.token_bytes(token)
    marks = {text.visible_bytes(token) for token in text.syntax.visible}
    assert marks == {b"[TOOL_CALLS]", b"[ARGS]", b"[THINK]", b"[/THINK]"}
    for token, name in text.syntax.visible.items():
        assert (text.token_bytes(token), text.token_name(token)) == (b"", name)
    assert text.token_name(10**6) == "<1000000>"


async def test_the_front_reads_calls_and_decodes(text: ModelText, adapter: Adapter) -> None:
    assert await text.parse_calls('stop[ARGS]{"now": true}', []) == [("stop", '{"now": true}')]
    assert await text.parse_calls("stop what?", []) == []
    [tokens] = await text.tokenize_all(["Hello, world!"], limit=100)
    assert await text.decode(tokens) == adapter.tokenizer.decode(tokens)


async def test_a_folder_that_cannot_be_read_is_a_load_failure(
    process: TextProcess, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadFailed, match=r"config\.json"):
        await process.open(tmp_path, "nothing", trust_remote_code=False)


async def test_models_outlive_the_process_and_one_that_is_closed_leaves_the_others(
    process: TextProcess, text: ModelText, folder: Path
) -> None:
    other = await process.open(folder, "other", trust_remote_code=False)
    before = await text.prepare(user("Hi"), None, limit=1000)
    other.close()
    await process.kill()
    asked = (text.prepare(user("Hi"), None, limit=1000) for _ in range(3))
    assert await asyncio.gather(*asked) == [before] * 3
