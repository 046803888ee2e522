"""Each syntax of calls: recognised, read however it comes, forced as its template writes it."""

import json
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.schemas.internal import ChatPrompt, ToolUse
from mlx_server.services.output.completion import OutputReader
from mlx_server.services.output.pieces import Kind
from tests.support.calls import END, START, WRITTEN, calling_adapter
from tests.unit.test_grammars import accepts, tokens_of, user

FORECAST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "hours": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city", "days"],
}
HARD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 6},
        "count": {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "null"}]},
        "either": {"type": ["string", "boolean"], "maxLength": 4},
        "where": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 3},
                "tags": {"type": "array", "items": {"enum": ["a", "b,", "}"]}, "maxItems": 2},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
        "level": {"$ref": "#/$defs/level"},
        "day": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[a-z<]{2}", "maxLength": 4},
        "word": {"type": "string", "pattern": "(b|c)$", "maxLength": 4},
    },
    "required": ["text", "where"],
    "$defs": {"level": {"enum": ["low", "high]", 3]}},
}


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    function = {"name": name} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


EXACT = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]/\\d$"}}}
TOOLS = [tool("forecast", FORECAST), tool("stop_it", None), tool("put", HARD)]
USE = ToolUse(TOOLS)
CITY = "Rome {it}, \"<b>'s ```json functools[\\\n"
ROME = {"city": CITY, "days": 3, "unit": "C", "exact": True, "hours": [1, 20]}
ONE = [("forecast", ROME)]
TWO = [*ONE, ("stop_it", {})]


@pytest.fixture(scope="module", params=WRITTEN)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapter(style: str, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return calling_adapter(tmp_path_factory.mktemp(style), style)


def written(adapter: Adapter, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """As the template writes them."""
    made = [
        {"id": str(i), "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    said = {"role": "assistant", "content": "", "tool_calls": made}
    prompt = ChatPrompt([{"role": "user", "content": "Hi"}, said])
    text = adapter.template.render(prompt, add_generation_prompt=False)
    return text.partition(START)[2].removesuffix(END)


def read(adapter: Adapter, *texts: str, use: ToolUse = USE) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of a completion that comes in pieces."""
    reader = OutputReader(adapter.syntax, use, thinking=False)
    pieces = []
    for text in [*texts, None]:
        if reader.done:
            break
        pieces += reader.finish("stop") if text is None else reader.push(text)
        while (block := reader.unparsed) is not None:
            pieces += reader.parsed(adapter.parse_calls(block, TOOLS))
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.kind is Kind.CALL:
            calls.append([piece.text, ""])
        elif piece.kind is Kind.ARGUMENTS:
            calls[-1][1] += piece.text
    said = "".join(piece.text for piece in pieces if piece.kind is Kind.TEXT)
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


def test_the_template_tells_the_style(style: str, adapter: Adapter) -> None:
    assert adapter.style is not None
    assert adapter.style.name == style


def test_its_calls_are_read_however_they_come(style: str, adapter: Adapter) -> None:
    calls = TWO if WRITTEN[style].parallel else ONE
    text = written(adapter, calls)
    assert read(adapter, text) == ("", calls)
    assert read(adapter, *text) == ("", calls)
    for size in (2, 3, 7):
        cut = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(adapter, "I look.\n\n", *cut) == ("I look.", calls)
    if WRITTEN[style].parallel:
        assert read(adapter, *text, use=ToolUse(TOOLS, parallel=False)) == ("", ONE)


def test_its_special_tokens_can_be_seen_in_the_text(style: str, adapter: Adapter) -> None:
    text = written(adapter, ONE)
    seen = adapter.syntax.visible.values()
    assert set(seen) >= {token for token in WRITTEN[style].tokens if token in text}


def required(**options: Any) -> ChatPrompt:
    return user("Hi", tools=TOOLS, use=ToolUse(TOOLS, "required", **options))


def test_a_forced_call_is_what_the_template_writes(style: str, adapter: Adapter) -> None:
    grammar = adapter.prepare(required(), None).grammar
    assert accepts(adapter, grammar, written(adapter, ONE))
    if WRITTEN[style].parallel:
        assert accepts(adapter, grammar, written(adapter, TWO))
    assert not accepts(adapter, grammar, written(adapter, [("forecast", ROME | {"days": 15})]))
    assert not accepts(adapter, grammar, "Hello.")


def test_what_a_forced_model_says_at_random_is_valid_calls(adapter: Adapter) -> None:
    validators = {
        name: Draft202012Validator(one["function"].get("parameters", {}))
        for one in TOOLS
        if (name := one["function"]["name"])
    }
    drawn = random.Random(1)
    for bound in (required(), required(parallel=False)):
        grammar = adapter.prepare(bound, None).grammar
        for _ in range(4):
            text = said_at_random(adapter, grammar, drawn)
            rest, calls = read(adapter, text)
            assert (rest, bool(calls)) == ("", True), text
            for name, arguments in calls:
                problem = next(validators[name].iter_errors(arguments), None)
                assert problem is None, f"{text}: {problem}"


def test_texts_can_be_held_to_a_pattern(style: str, adapter: Adapter) -> None:
    tools = [tool("put", EXACT)]
    grammar = adapter.prepare(user("Hi", use=ToolUse(tools, "required")), None).grammar
    assert accepts(adapter, grammar, written(adapter, [("put", {"code": "A/1"})]))
    assert not accepts(adapter, grammar, written(adapter, [("put", {"code": "A/11"})]))


def said_at_random(adapter: Adapter, grammar: str | None, drawn: random.Random) -> str:
    """After a while, ends texts and the answer as soon as they may."""
    assert grammar is not None
    assert adapter.style is not None
    tokens = tokens_of(adapter)
    matcher = LLMatcher(tokens, grammar)
    ends = [adapter.tokenizer.encode_bare(end) for end in ('"', *adapter.style.texts) if end]
    said: list[int] = []
    while not matcher.is_stopped():
        late = len(said) > 40
        assert len(said) < 4000
        if matcher.is_accepting() and (late or drawn.random() < 0.5):
            break
        new = drawn.choice(ends) if late and drawn.random() < 0.5 else []
        taken = matcher.try_consume_tokens(new)
        said += new[:taken]
        if not taken:
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(tokens.vocab_size) if mask[i // 8] >> i % 8 & 1]
            said.append(drawn.choice([i for i in allowed if i not in adapter.stop_tokens]))
            assert matcher.consume_token(said[-1]), matcher.get_error()
    visible = adapter.syntax.visible
    of = adapter.tokenizer.token_bytes
    data = b"".join(visible[i].encode() if i in visible else of(i) for i in said)
    return data.decode("utf-8", "replace")


def test_a_strict_tool_binds_its_calls(style: str, adapter: Adapter) -> None:
    function = TOOLS[0]["function"] | {"strict": True}
    tools = [{"type": "function", "function": function}, *TOOLS[1:]]
    grammar = adapter.prepare(user("Hi", tools=tools, use=ToolUse(tools)), None).grammar
    assert adapter.style is not None
    before = "I look.\n" if adapter.style.syntax.start and style != "llama" else ""
    right, wrong = written(adapter, ONE), written(adapter, [("forecast", ROME | {"days": 15})])
    assert accepts(adapter, grammar, "Just talk.")
    assert accepts(adapter, grammar, before + right)
    assert not accepts(adapter, grammar, before + wrong)
    if WRITTEN[style].parallel:
        free = written(adapter, [("put", {"text": "longer than is allowed"})])
        assert accepts(adapter, grammar, before + free)


BARE = {
    "hermes": '{"name": "forecast", "arguments": {"city": "Rome", "days": 3}}',
    "qwen-coder": "<function=forecast>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "seed": "<function=forecast><parameter=city>Rome</parameter><parameter=days>3</function>",
    "minimax": '<invoke name="forecast">\n<parameter name="city">Rome</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>',
    "deepseek": '<｜tool▁call▁begin｜>forecast<｜tool▁sep｜>{"city": "Rome", "days": 3}'
    "<｜tool▁call▁end｜>",
    "deepseek-markup": '<｜DSML｜invoke name="forecast">\n'
    '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>',
    "kimi": '<|tool_call_begin|>forecast:0<|tool_call_argument_begin|>{"city": "Rome", "days": 3}',
    "llama": '<|python_tag|>forecast.call(city="Rome", days=3)',
    "llama-bare": "<|python_start|>[forecast(city='Rome', days=3)]<|python_end|>",
    "lfm2": "[forecast(city='Rome', days='3')]",
    "pythonic": "<|python_start|>[forecast(city='Rome', days=3)]<|python_end|>",
    "glm": '<tool_call>{"name": "forecast", "arguments": {"city": "Rome", "days": 3}}</tool_call>',
    "mistral-headers": '[TOOL_CALLS]forecast[CALL_ID]Ab3dE6gH9[ARGS]{"city": "Rome", "days": "3"}',
    "command": '[{"tool_call_id": "0", "tool_name": "forecast", '
    '"parameters": {"city": "Rome", "days": 3}}]',
    "command-r": 'Action: ```json\n[{"parameters": {"city": "Rome", "days": 3}, '
    '"tool_name": "forecast"}]\n```',
    "phi": 'functools[{"name": "forecast", "arguments": {"city": "Rome", "days": "3"}}]',
    "mistral": '[TOOL_CALLS]forecast{"city": "Rome", "days": 3}',
    "function-gemma": "<start_function_call>call:forecast{city:Rome,days:<escape>3<escape>}"
    "<end_function_call>",
    "apertus": '<|tools_prefix|>[{"forecast": {"city": "Rome", "days": "3"}}]<|tools_suffix|>',
}


@pytest.mark.parametrize("style", BARE, scope="module")
def test_calls_out_of_shape_are_read_too(style: str, adapter: Adapter) -> None:
    said = BARE[style]
    wanted = ("", [("forecast", {"city": "Rome", "days": 3})])
    assert read(adapter, said) == wanted
    assert read(adapter, *said) == wanted


def test_an_end_marker_within_a_value_is_no_end(style: str, adapter: Adapter) -> None:
    assert adapter.style is not None
    syntax = adapter.style.syntax
    city = f"a{syntax.end}b" if syntax.json or syntax.shields else "ab"
    calls = [("forecast", {"city": city, "days": 1})]
    text = written(adapter, calls)
    assert read(adapter, text) == ("", calls)
    assert read(adapter, *text) == ("", calls)
