"""Tool calls in each family's own syntax: what a grammar lets a model say, and how it is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_server.errors import BadRequest
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.schemas.internal import ChatPrompt, Constraint, ToolUse
from tests.support.tiny import FAMILIES
from tests.unit.test_grammars import Speaker, accepts, tiny_adapter, user

FORECAST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
}
EXACT = {"city": {"type": "string", "pattern": "^[A-Z]+$"}}


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("forecast", FORECAST), tool("stop", {"type": "object", "properties": {}})]
ROME = {"city": "Rome {it}", "days": 3, "unit": "C"}
PLAIN = {"city": "Rome", "days": 14}

CALL = '{"name": "forecast", "arguments": {"city": "Rome {it}", "days": 3, "unit": "C"}}'
WRONG_CALL = '{"name": "forecast", "arguments": {"city": "Rome", "days": 15}}'
SYNTAXES: dict[str, tuple[str, list[str], list[str]]] = {
    "qwen": (
        "hermes",
        ["<tool_call>", f"\n{CALL}\n", "</tool_call>"],
        ["<tool_call>", f"\n{WRONG_CALL}\n", "</tool_call>"],
    ),
    "generic": (
        "generic",
        [f"<tool_call>\n{CALL}\n</tool_call>"],
        [f"<tool_call>\n{WRONG_CALL}\n</tool_call>"],
    ),
    "llama": (
        "llama",
        ["<|python_tag|>", CALL.replace("arguments", "parameters")],
        ["<|python_tag|>", CALL],
    ),
    "mistral-tools": (
        "mistral",
        ["[TOOL_CALLS]", f"[{CALL}]"],
        ["[TOOL_CALLS]", f"[{WRONG_CALL}]"],
    ),
    "mistral-headers": (
        "mistral-headers",
        ["[TOOL_CALLS]", "forecast", "[ARGS]", json.dumps(ROME)],
        ["[TOOL_CALLS]", "forecast", "[ARGS]", "{}"],
    ),
    "phi-tools": (
        "phi",
        ["<|tool_call|>", f"[{CALL}]", "<|/tool_call|>"],
        ["<|tool_call|>", CALL, "<|/tool_call|>"],
    ),
    "gemma-tools": (
        "gemma",
        [
            "<|tool_call>",
            "call:forecast{city:",
            '<|"|>',
            "Rome {it}",
            '<|"|>',
            ",days:3,unit:",
            '<|"|>',
            "C",
            '<|"|>',
            "}",
            "<tool_call|>",
        ],
        ["<|tool_call>", "call:forecast{city:", '"Rome"', ",days:3}", "<tool_call|>"],
    ),
    "function-gemma": (
        "function-gemma",
        [
            "<start_function_call>",
            "call:forecast{city:",
            "<escape>",
            "Rome",
            "<escape>",
            ",days:14}",
            "<end_function_call>",
        ],
        ["<start_function_call>", "call:forecast{days:14}", "<end_function_call>"],
    ),
    "qwen-coder": (
        "qwen-coder",
        [
            "<tool_call>",
            "\n<function=forecast>\n<parameter=city>\nRome {it}\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n",
            "</tool_call>",
        ],
        [
            "<tool_call>",
            "\n<function=forecast>\n<parameter=days>\n3\n</parameter>\n</function>\n",
            "</tool_call>",
        ],
    ),
}
"""By tiny model: the syntax it has, a call in it, and what is none. Special tokens stand alone."""
SAID = {"function-gemma": PLAIN}
"""The arguments that the call above has, where they are not ROME."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("tools")
    families = dict.fromkeys([*FAMILIES, *SYNTAXES, "qwen-thinking"])
    return {family: tiny_adapter(folder / family, family) for family in families}


def required(tools: list[dict[str, Any]], **options: Any) -> ChatPrompt:
    return user("Hi", tools=tools, use=ToolUse(tools, "required", **options))


def between_markers(adapter: Adapter, text: str) -> str:
    """What a reader of the model's text takes for calls."""
    syntax = adapter.syntax.calls
    assert syntax is not None
    inside = text[text.index(syntax.start) + len(syntax.start) :]
    return inside[: inside.rindex(syntax.end)] if syntax.end else inside


@pytest.mark.parametrize("family", SYNTAXES)
def test_a_forced_call_is_said_in_the_familys_syntax_and_read_back(
    adapters: dict[str, Adapter], family: str
) -> None:
    adapter, (syntax, said, wrong) = adapters[family], SYNTAXES[family]
    prepared = adapter.prepare(required(TOOLS), None)
    assert adapter.style is not None
    assert adapter.style.name == syntax
    assert accepts(adapter, prepared.grammar, *said)
    assert not accepts(adapter, prepared.grammar, *wrong)
    assert not Speaker(adapter, prepared.grammar).says("Hello")
    [(name, arguments)] = adapter.parse_calls(between_markers(adapter, "".join(said)), TOOLS)
    assert (name, json.loads(arguments)) == ("forecast", SAID.get(family, ROME))


@pytest.mark.parametrize("family", SYNTAXES)
def test_the_markers_of_a_call_can_be_seen_in_the_text(
    adapters: dict[str, Adapter], family: str
) -> None:
    adapter, (_, said, _) = adapters[family], SYNTAXES[family]
    visible = adapter.syntax.visible
    for text in said:
        token = adapter.tokenizer.token_id(text)
        if token is not None:
            said_bytes = adapter.tokenizer.token_bytes(token)
            assert visible.get(token) == text or said_bytes == text.encode()


SEVERAL = {
    "qwen": [
        "<tool_call>",
        "\n{}\n",
        "</tool_call>",
        "\n",
        "<tool_call>",
        "\n{}\n",
        "</tool_call>",
    ],
    "mistral-tools": ["[TOOL_CALLS]", "[{}, {}]"],
    "phi-tools": ["<|tool_call|>", "[{}, {}]", "<|/tool_call|>"],
    "generic": ["<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>"],
}


@pytest.mark.parametrize("family", SEVERAL)
def test_several_calls_are_made_only_where_they_may_be(
    adapters: dict[str, Adapter], family: str
) -> None:
    adapter = adapters[family]
    stop = '{"name": "stop", "arguments": {}}'
    said = [text.replace("{}", CALL, 1).replace("{}", stop, 1) for text in SEVERAL[family]]
    if family == "qwen":
        said[5] = f"\n{stop}\n"
    assert accepts(adapter, adapter.prepare(required(TOOLS), None).grammar, *said)
    alone = adapter.prepare(required(TOOLS, parallel=False), None).grammar
    assert not accepts(adapter, alone, *said)


def test_a_named_tool_is_the_only_one(adapters: dict[str, Adapter]) -> None:
    adapter = adapters["generic"]
    use = ToolUse(TOOLS[1:], "named", "stop", parallel=False)
    prepared = adapter.prepare(user("Hi", tools=TOOLS, use=use), None)
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert accepts(adapter, prepared.grammar, call)
    assert not Speaker(adapter, prepared.grammar).says('<tool_call>\n{"name": "forecast"')


def test_thinking_may_come_before_a_forced_call(adapters: dict[str, Adapter]) -> None:
    said = SYNTAXES["qwen"][1]
    for family, opening in (("qwen", ["<think>"]), ("qwen-thinking", [])):
        grammar = adapters[family].prepare(required(TOOLS), None).grammar
        assert accepts(adapters[family], grammar, *opening, "Hm", "</think>", "\n\n", *said)


@pytest.mark.parametrize("family", ["gemma-tools", "function-gemma", "qwen-coder", "mistral"])
def test_what_a_notation_cannot_say_is_called_in_json(
    adapters: dict[str, Adapter], family: str
) -> None:
    adapter = adapters[family]
    tools = [tool("forecast", {"properties": EXACT, "required": ["city"]})]
    grammar = adapter.prepare(required(tools), None).grammar
    syntax = adapter.syntax.calls
    assert syntax is not None
    gap = "\n" if "</" in syntax.end else ""
    call = '{"name": "forecast", "arguments": {"city": "%s"}}'
    assert accepts(adapter, grammar, syntax.start, gap + call % "ROME" + gap, syntax.end)
    assert not accepts(adapter, grammar, syntax.start, gap + call % "Rome" + gap, syntax.end)
    assert adapter.parse_calls(call % "ROME", tools) == [("forecast", '{"city": "ROME"}')]


def test_what_only_mlx_lm_reads_is_forced_in_json(tmp_path: Path) -> None:
    template = "{#- tools <atem:function_calls> -#}{{ messages[0].content }}"
    adapter = tiny_adapter(tmp_path / "tiny", "generic", template=template)
    syntax = adapter.syntax.calls
    assert syntax is not None
    grammar = adapter.prepare(required(TOOLS), None).grammar
    one = f"{syntax.start}{CALL}{syntax.end}"
    assert accepts(adapter, grammar, one)
    assert accepts(adapter, grammar, one + one)
    assert not accepts(adapter, grammar, one.replace(CALL, WRONG_CALL))


# free to call


def test_a_model_that_may_call_and_need_not_is_not_bound(adapters: dict[str, Adapter]) -> None:
    for adapter in adapters.values():
        prepared = adapter.prepare(user("Hi", tools=TOOLS, use=ToolUse(TOOLS)), None)
        assert prepared.grammar is None


@pytest.mark.parametrize("family", SYNTAXES)
def test_a_strict_tool_binds_only_once_a_call_has_begun(
    adapters: dict[str, Adapter], family: str
) -> None:
    adapter, (_, said, wrong) = adapters[family], SYNTAXES[family]
    tools = [tool("forecast", FORECAST, strict=True), TOOLS[1]]
    prepared = adapter.prepare(user("Hi", tools=tools, use=ToolUse(tools)), None)
    assert accepts(adapter, prepared.grammar, "Just talk.")
    assert accepts(adapter, prepared.grammar, "I shall look.\n", *said)
    assert not accepts(adapter, prepared.grammar, "I shall look.\n", *wrong)


@pytest.mark.parametrize("family", ["llama", "mistral-tools"])
def test_a_strict_call_without_its_marker_is_bound_too(
    adapters: dict[str, Adapter], family: str
) -> None:
    adapter, (_, said, wrong) = adapters[family], SYNTAXES[family]
    tools = [tool("forecast", FORECAST, strict=True)]
    grammar = adapter.prepare(user("Hi", tools=tools, use=ToolUse(tools)), None).grammar
    assert accepts(adapter, grammar, *said[1:])
    assert not accepts(adapter, grammar, *wrong[1:])
    assert accepts(adapter, grammar, "Say {this}")


def test_a_tool_that_is_not_strict_may_be_called_with_anything(
    adapters: dict[str, Adapter],
) -> None:
    tools = [tool("free", {"not": {}}), tool("forecast", FORECAST, strict=True)]
    grammar = adapters["generic"].prepare(user("Hi", tools=tools, use=ToolUse(tools)), None).grammar
    call = '<tool_call>\n{"name": "free", "arguments": {"x": [1]}}\n</tool_call>'
    assert accepts(adapters["generic"], grammar, call)


def test_an_answer_with_a_format_may_call_instead(adapters: dict[str, Adapter]) -> None:
    adapter = adapters["qwen"]
    bound = Constraint("choice", ["yes"], "response_format")
    prepared = adapter.prepare(user("Hi", tools=TOOLS, use=ToolUse(TOOLS)), bound)
    assert accepts(adapter, prepared.grammar, "yes")
    assert accepts(adapter, prepared.grammar, *SYNTAXES["qwen"][1])
    assert not Speaker(adapter, prepared.grammar).says("no")


# refusals


@pytest.mark.parametrize(
    "use", [{"choice": "required"}, {"choice": "named", "name": "bad"}, {"choice": "auto"}]
)
@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"properties": {"a": {"not": {}}}}, ".properties.a.not"),
        ({"properties": {"a": {"type": "thing"}}, "required": ["a"]}, ".properties.a"),
        ({"type": "string"}, ""),
    ],
)
def test_a_schema_of_arguments_that_cannot_be_kept_is_refused_by_its_place(
    adapters: dict[str, Adapter], use: dict[str, Any], parameters: dict[str, Any], place: str
) -> None:
    tools = [TOOLS[1], tool("bad", parameters, strict=True)]
    for family in ("generic", "qwen-coder", "gemma-tools"):
        with pytest.raises(BadRequest) as refused:
            adapters[family].prepare(user("Hi", use=ToolUse(tools, **use)), None)
        assert refused.value.param == "tools"
        assert f"`tools[1].function.parameters{place}`" in refused.value.message


# reading


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [("f", '{"a": 1}')]),
        ('{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", '{"a": 1}')]),
        ('{"name": "f"}', [("f", "{}")]),
        ('[{"name": "f"}, {"name": "g", "arguments": {}}]', [("f", "{}"), ("g", "{}")]),
        ('{"name": "f"}; {"name": "g"}', [("f", "{}"), ("g", "{}")]),
        ('{"type": "function", "function": {"name": "f"}}', [("f", "{}")]),
        ('{"name": "f", "arguments": {"a": NaN}}', []),
        ('{"name": "f", "arguments": [1]}', []),
        ('{"name": 1, "arguments": {}}', []),
        ('[{"name": "f"}, {"arguments": {}}]', []),
        ('{"name": "f", "argu', []),
        ("what a day", []),
        ("", []),
        ("[" * 100_000, []),
    ],
)
@pytest.mark.parametrize(
    "family", ["generic", "qwen", "qwen-coder", "gemma-tools", "mistral-tools"]
)
def test_calls_are_read_or_known_to_be_garbled(
    adapters: dict[str, Adapter], family: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert adapters[family].parse_calls(text, TOOLS) == calls


# prompts

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "forecast", "arguments": {"city": "Rome"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "Sunny"},
    {"role": "tool", "tool_call_id": "1", "content": "Hot"},
    {"role": "user", "content": "Thanks"},
]


def rendered(adapter: Adapter, *messages: dict[str, Any], **options: Any) -> str:
    tokens = adapter.prepare(ChatPrompt(list(messages), **options), None).tokens
    return adapter.tokenizer.backend.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("family", ["generic", "mistral", "gemma", "phi"])
def test_a_template_that_knows_no_tools_is_told_of_them_in_words(
    adapters: dict[str, Adapter], family: str
) -> None:
    start = CONVERSATION[1:] if family == "gemma" else CONVERSATION  # has no system role
    text = rendered(adapters[family], *start, tools=TOOLS)
    assert f"\n{json.dumps(TOOLS[0]['function'])}\n" in text
    call = '<tool_call>\n{"name": "forecast", "arguments": {"city": "Rome"}}\n</tool_call>'
    results = (
        "<tool_response>\nSunny\n</tool_response>\n<tool_response>\nHot\n</tool_response>\nThanks"
    )
    assert text.index(call) < text.index(results)


def test_a_system_message_and_the_tools_share_one_message(adapters: dict[str, Adapter]) -> None:
    text = rendered(adapters["generic"], *CONVERSATION[:2], tools=TOOLS)
    assert text.startswith("<|system|>\nBe brief.\n\nYou can call functions")
    assert text.count("<|system|>") == 1


def test_phi_finds_the_tools_in_its_system_message(adapters: dict[str, Adapter]) -> None:
    text = rendered(adapters["phi-tools"], *CONVERSATION, tools=TOOLS)
    assert text.startswith('<|system|>Be brief.<|tool|>[{"name": "forecast"')
    assert '<|tool_call|>[{"name": "forecast", "arguments": {"city": "Rome"}}]' in text
    without = rendered(adapters["phi-tools"], CONVERSATION[1], tools=TOOLS)
    assert without.startswith('<|system|><|tool|>[{"name": "forecast"')


@pytest.mark.parametrize("family", ["qwen", "mistral-tools", "qwen-coder", "gemma-tools"])
def test_a_template_that_knows_tools_renders_them_itself(
    adapters: dict[str, Adapter], family: str
) -> None:
    text = rendered(adapters[family], *CONVERSATION[1:], tools=TOOLS)
    assert "You can call functions" not in text
    assert "forecast" in text
    assert "Sunny" in text


def test_a_model_without_a_template_calls_no_tools(tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "bare", "llama", template=None)
    assert adapter.syntax.calls is None
