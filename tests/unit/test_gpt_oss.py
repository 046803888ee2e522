"""gpt-oss: prompts of its conversations, and what its grammars let it say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_server.errors import BadRequest
from mlx_server.models.store.capabilities import read_capabilities
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.syntax import Thinking
from mlx_server.schemas.internal import ChatPrompt, Constraint, ToolUse
from tests.support.tiny import build_tiny_model
from tests.unit.test_grammars import Speaker, accepts, tiny_adapter, user

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
YES = Constraint("choice", ["yes"], "response_format")
THOUGHT = ["<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", "assistant"]
PREAMBLE = ["<|channel|>", "commentary", "<|message|>", "I look.", *THOUGHT[4:]]
FINAL = ["<|channel|>", "final", "<|message|>"]
ROME = '{"city": "Rome"}'
CALLS = {
    "channel": ["<|channel|>", "commentary to=functions.weather ", "<|constrain|>", "json"],
    "role": [" to=functions.weather", "<|channel|>", "commentary json"],
    "no-space": ["<|channel|>", "commentary to=functions.weather", "<|constrain|>", "json"],
}
CALL = [*CALLS["channel"], "<|message|>", ROME]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(tmp_path_factory.mktemp("gpt-oss"), "gpt-oss")


def turns(adapter: Adapter, *messages: dict[str, Any], **options: Any) -> str:
    """The prompt after the system message."""
    tokens = adapter.prepare(ChatPrompt(list(messages), **options), None).tokens
    text = adapter.tokenizer.backend.decode(tokens, skip_special_tokens=False)
    return text.partition("<|end|>")[2]


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text} | more


def calling(*calls: tuple[str, str, dict[str, Any]], text: str = "", **more: Any) -> dict[str, Any]:
    made = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, name, arguments in calls
    ]
    return said("assistant", text, tool_calls=made, **more)


HELLO = said("user", "Hello?")
ASKED = "<|start|>user<|message|>Hello?<|end|>"
TURN = "<|start|>assistant"
CALLED = "<|channel|>commentary json<|message|>"
BACK = " to=assistant<|channel|>commentary<|message|>"


def test_files_tell_that_it_thinks_and_knows_tools(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "told", "gpt-oss")
    told = read_capabilities(ModelEntry(id="told", path=folder, source="folder"))
    assert told is not None
    assert (told.reasoning, told.native_tools) == (True, True)


# prompts


def test_a_prompt_ends_where_the_model_names_a_channel(adapter: Adapter) -> None:
    told = said("system", "Be brief.")
    instructions = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
    assert turns(adapter, told, HELLO) == instructions + ASKED + TURN
    assert adapter.prepare(ChatPrompt([HELLO]), None).thinking is Thinking.POSSIBLE
    names = {adapter.tokenizer.token_name(token) for token in adapter.stop_tokens}
    assert names == {"<|return|>", "<|call|>", "<|endoftext|>"}


@pytest.mark.parametrize(
    ("asked", "effort"),
    [(None, "medium"), ("low", "low"), ("high", "high"), ("none", "low"), ("minimal", "low"),
     ("xhigh", "high"), ("max", "high")],
)  # fmt: skip
def test_the_effort_reaches_the_template_in_the_models_own_words(
    adapter: Adapter, asked: str | None, effort: str
) -> None:
    options = {"template_kwargs": {"reasoning_effort": asked}} if asked else {}
    tokens = adapter.prepare(ChatPrompt([HELLO], **options), None).tokens
    assert f"\nReasoning: {effort}\n" in adapter.tokenizer.decode(tokens)


def test_tools_are_shown_with_or_without_a_description(adapter: Adapter) -> None:
    shown = turns(adapter, HELLO, tools=TOOLS)
    assert "\n// \ntype weather = (_: {\ncity: string,\n}) => any;\n" in shown
    assert "\n// \ntype now = () => any;\n" in shown


def test_a_default_of_any_type_is_shown(adapter: Adapter) -> None:
    size = {"type": "integer", "enum": [1, 2], "default": 1}
    function = {"name": "pick", "parameters": {"type": "object", "properties": {"size": size}}}
    shown = turns(adapter, HELLO, tools=[{"type": "function", "function": function}])
    assert '\nsize?: "1" | "2", // default: 1,\n' in shown


def test_results_that_are_alike_are_all_shown(adapter: Adapter) -> None:
    calls = calling(("1", "now", {}), ("2", "weather", {"city": "Rome"}))
    results = [said("tool", "9", tool_call_id=one) for one in ("1", "2", "2")]
    assert turns(adapter, HELLO, calls, *results).count('"9"') == 3


def test_thinking_before_a_call_stays_until_the_answer(adapter: Adapter) -> None:
    call = calling(("1", "weather", {"city": "Rome"}), reasoning_content="Rome it is.")
    result = said("tool", "Sunny", tool_call_id="1")
    thought = f"{TURN}<|channel|>analysis<|message|>Rome it is.<|end|>"
    made = f"{TURN} to=functions.weather{CALLED}{ROME}<|call|>"
    told = f'<|start|>functions.weather{BACK}"Sunny"<|end|>'
    assert turns(adapter, HELLO, call, result) == ASKED + thought + made + told + TURN
    answer = said("assistant", "Sunny.", reasoning_content="It shines.")
    final = f"{TURN}<|channel|>final<|message|>Sunny.<|end|>"
    after = turns(adapter, HELLO, call, result, answer, HELLO)
    assert after == ASKED + made + told + final + ASKED + TURN


def test_text_and_thinking_before_a_call_are_one_thought(adapter: Adapter) -> None:
    call = calling(("1", "now", {}), text="I shall look.", reasoning_content="What time?")
    shown = turns(adapter, HELLO, call, said("tool", "9", tool_call_id="1"))
    assert "<|channel|>analysis<|message|>What time?\n\nI shall look.<|end|>" in shown


@pytest.mark.parametrize("order", [("1", "2"), ("2", "1"), ("a", "b"), ("2", "x")])
def test_each_of_several_calls_is_followed_by_its_result(
    adapter: Adapter, order: tuple[str, str]
) -> None:
    calls = calling(("1", "weather", {"city": "Rome"}), ("2", "now", {}), reasoning_content="Both.")
    told = {"1": "Sunny", "2": "9", "a": "Sunny", "b": "9", "x": "Sunny"}
    results = [said("tool", told[one], tool_call_id=one) for one in order]
    assert turns(adapter, HELLO, calls, *results) == (
        f"{ASKED}{TURN}<|channel|>analysis<|message|>Both.<|end|>"
        f"{TURN} to=functions.weather{CALLED}{ROME}<|call|>"
        f'<|start|>functions.weather{BACK}"Sunny"<|end|>'
        f"{TURN} to=functions.now{CALLED}{{}}<|call|>"
        f'<|start|>functions.now{BACK}"9"<|end|>{TURN}'
    )


def test_a_result_of_no_call_is_told_by_the_user(adapter: Adapter) -> None:
    shown = turns(adapter, HELLO, said("tool", "Sunny", tool_call_id="1"))
    told = "<|start|>user<|message|><tool_response>\nSunny\n</tool_response><|end|>"
    assert shown == ASKED + told + TURN


def test_an_answer_that_quotes_marks_is_taken_back(adapter: Adapter) -> None:
    quoted = "It writes <|channel|>final<|message|> and <|start|>."
    shown = turns(adapter, HELLO, said("assistant", quoted, reasoning_content=quoted), HELLO)
    assert "It writes <\u200b|channel|>final<|message|> and <|start|>." in shown


def test_an_answer_that_is_begun_goes_on_in_its_channel(adapter: Adapter) -> None:
    begun = said("assistant", "It is", reasoning_content="Hm.")
    shown = turns(adapter, HELLO, begun, continue_final=True)
    thought = f"{TURN}<|channel|>analysis<|message|>Hm.<|end|>"
    assert shown == f"{ASKED}{thought}{TURN}<|channel|>final<|message|>It is"
    prompt = ChatPrompt([HELLO, begun], continue_final=True)
    prepared = adapter.prepare(prompt, YES)
    assert prepared.thinking is Thinking.DONE
    assert accepts(adapter, prepared.grammar, "yes")
    assert not Speaker(adapter, prepared.grammar).says("<|channel|>")


@pytest.mark.parametrize(
    ("opening", "thinking"), [("analysis", Thinking.OPEN), ("final", Thinking.DONE)]
)
def test_a_template_may_open_a_channel(
    tmp_path: Path, adapter: Adapter, opening: str, thinking: Thinking
) -> None:
    template = adapter.template.source + (
        "{%- if add_generation_prompt %}{{- '<|channel|>" + opening + "<|message|>' }}{% endif %}"
    )
    opened = tiny_adapter(tmp_path / "opened", "gpt-oss", template=template)
    prepared = opened.prepare(ChatPrompt([HELLO]), YES)
    assert prepared.thinking is thinking
    over = ["Hm", *THOUGHT[4:], *FINAL] if thinking is Thinking.OPEN else []
    assert accepts(opened, prepared.grammar, *over, "yes")


# grammars


@pytest.mark.parametrize("place", CALLS)
@pytest.mark.parametrize("thoughts", [0, 1, 2])
def test_a_forced_call_is_said_in_channels(adapter: Adapter, place: str, thoughts: int) -> None:
    for choice in ("required", "named"):
        use = ToolUse(TOOLS[:1], choice, "weather")
        grammar = adapter.prepare(user("Hi", tools=TOOLS, use=use), None).grammar
        call = [*CALLS[place], "<|message|>", ROME]
        assert accepts(adapter, grammar, *THOUGHT * thoughts, *call)
        assert not accepts(adapter, grammar, *call[:-1], '{"town": "Rome"}')
        assert not Speaker(adapter, grammar).says(*FINAL)
        assert not Speaker(adapter, grammar).says("Hello")


def test_a_format_binds_the_final_channel(adapter: Adapter) -> None:
    grammar = adapter.prepare(user("Hi"), YES).grammar
    assert accepts(adapter, grammar, *FINAL, "yes")
    assert accepts(
        adapter, grammar, *THOUGHT, *FINAL[:2], " ", "<|constrain|>", "json", FINAL[2], "yes"
    )
    assert not accepts(adapter, grammar, *FINAL, "no")
    assert not Speaker(adapter, grammar).says(*PREAMBLE[:2])
    assert not Speaker(adapter, grammar).says(*CALL[:2])
    may_call = adapter.prepare(user("Hi", tools=TOOLS, use=ToolUse(TOOLS)), YES).grammar
    assert accepts(adapter, may_call, *CALL)
    assert accepts(adapter, may_call, *FINAL, "yes")


def test_a_strict_tool_binds_only_its_calls(adapter: Adapter) -> None:
    strict = {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}
    use = ToolUse([strict, TOOLS[1]])
    grammar = adapter.prepare(user("Hi", tools=TOOLS, use=use), None).grammar
    for before in ([], THOUGHT, PREAMBLE, [*PREAMBLE, *THOUGHT]):
        assert accepts(adapter, grammar, *before, *CALL)
        assert accepts(adapter, grammar, *before, *FINAL, "Anything {}")
        assert not accepts(adapter, grammar, *before, *CALL[:-1], "{}")
    free = ["<|channel|>", "commentary to=functions.now ", "<|constrain|>", "json", "<|message|>"]
    assert accepts(adapter, grammar, *free, '{"zone": "CET"}')


def test_an_answer_that_nothing_binds_has_no_grammar(adapter: Adapter) -> None:
    prompt = user("Hi", tools=TOOLS, use=ToolUse(TOOLS))
    assert adapter.prepare(prompt, None).grammar is None


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("bound", [None, YES])
def test_a_budget_ends_the_analysis_and_nothing_else(
    adapter: Adapter, budget: int, bound: Constraint | None
) -> None:
    grammar = adapter.prepare(user("Hi", thinking_budget=budget), bound).grammar
    speaker = Speaker(adapter, grammar)
    if budget:
        assert speaker.says(*THOUGHT[:3])
        assert all(speaker.says("x") for _ in range(budget))
        assert speaker.allowed() == {adapter.tokenizer.token_id("<|end|>")}
        assert speaker.says(*THOUGHT[4:])
    assert speaker.says(FINAL[0])
    assert not speaker.says("analysis")
    assert speaker.says(*FINAL[1:], "yes")
    assert speaker.may_end()


def test_thinking_that_is_turned_off_is_left_out(adapter: Adapter) -> None:
    prompt = user("Hi", template_kwargs={"enable_thinking": False})
    grammar = adapter.prepare(prompt, None).grammar
    assert not Speaker(adapter, grammar).says(*THOUGHT[:2])
    assert accepts(adapter, grammar, *FINAL, "Anything")


def test_arguments_that_cannot_be_kept_are_refused_by_their_place(adapter: Adapter) -> None:
    wrong = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "bad", "parameters": wrong}}]
    with pytest.raises(BadRequest) as refused:
        adapter.prepare(user("Hi", tools=tools, use=ToolUse(tools, "required")), None)
    assert "`tools[2].function.parameters.properties.a.not`" in refused.value.message


def test_arguments_in_the_history_may_be_no_object(adapter: Adapter) -> None:
    made = calling(("1", "weather", {}))
    made["tool_calls"][0]["function"]["arguments"] = '{"city": "Ro'
    shown = turns(adapter, HELLO, made, said("tool", "?", tool_call_id="1"))
    assert json.dumps('{"city": "Ro') in shown
