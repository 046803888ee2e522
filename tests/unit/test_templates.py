"""Conversations through templates that behave as the published ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.conversations.repairs import REPAIRS, repaired
from mlx_server.schemas.internal import ChatPrompt
from tests.support.openai import chat_prompt
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


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def calling(*names: str, **more: Any) -> Message:
    calls = [
        {"id": call_id(name), "type": "function", "function": {"name": name, "arguments": given}}
        for name in names
        for given in [{"city": f"arg{name}"}]
    ]
    return assistant("", tool_calls=calls) | more


def result(name: str, text: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id(name), "content": text}


def call_id(name: str) -> str:
    """As this server gives them out."""
    return "call_" + name.ljust(24, "x")


def tool(name: str) -> Message:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": name, "description": "Tells.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("fone"), tool("ftwo")]
TALK = [user("uone"), assistant("aone"), user("utwo")]


SHAPES: dict[str, list[Message]] = {
    "a talk": TALK,
    "a system message": [system("sone"), user("uone")],
    "two system messages": [system("sone"), system("stwo"), user("uone")],
    "a system message at the end": [user("uone"), system("stwo")],
    "one behind an answer": [
        *(system("sone"), user("uone"), assistant("aone")),
        *(system("stwo"), user("utwo")),
    ],
    "one behind a question": [system("sone"), user("uone"), system("stwo"), *TALK[1:]],
    "a system message alone": [system("sone")],
    "a system message and an answer": [system("sone"), *TALK],
    "two questions": [user("uone"), user("utwo")],
    "two answers": [user("uone"), assistant("aone"), assistant("atwo"), user("utwo")],
    "an empty answer": [user("uone"), assistant(""), user("utwo")],
    "an answer first": [assistant("aone"), user("uone")],
    "a call": [user("uone"), calling("fone"), result("fone", "rone")],
    "a call under a system message": [
        *(system("sone"), user("uone"), calling("fone"), result("fone", "rone")),
    ],
    "a call done with": [
        *(user("uone"), calling("fone"), result("fone", "rone")),
        *(assistant("aone"), user("utwo")),
    ],
    "two calls at once": [
        *(user("uone"), calling("fone", "ftwo")),
        *(result("ftwo", "rtwo"), result("fone", "rone")),
    ],
    "two calls one by one": [
        *(user("uone"), calling("fone"), result("fone", "rone")),
        *(calling("ftwo"), result("ftwo", "rtwo")),
    ],
    "a word in between": [user("uone"), calling("fone"), result("fone", "rone"), user("utwo")],
    "a reminder in between": [
        *(user("uone"), calling("fone"), system("stwo"), result("fone", "rone"), assistant("aone")),
        user("utwo"),
    ],
    "a call that was given up": [user("uone"), calling("fone"), user("utwo")],
    "a result of no call": [user("uone"), result("fone", "rone"), user("utwo")],
}


def texts(messages: list[Message]) -> list[str]:
    """All that must reach the model."""
    said = [message["content"] for message in messages]
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    return [*filter(None, said), *(f"arg{call['name']}" for call in calls)]


def as_it_is(name: str, messages: list[Message], tools: list[Message] | None) -> str:
    """What transformers makes of it, "" if the template refuses or drops something, or puts what
    the system says later in front of what came before."""
    kind = PUBLISHED[name]
    template = kind.chat_template
    if isinstance(template, list):
        template = template[1 if tools else 0]["template"]
    try:
        [text], _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=True,
            bos_token=kind.bos,
            eos_token=kind.special[0],
        )
    except Exception:  # noqa: BLE001
        return ""
    wanted = [*texts(messages), *(one["function"]["name"] for one in tools or ())]
    late = system("stwo") in messages and user("uone") in messages[: messages.index(system("stwo"))]
    if late and text.find("stwo") < text.find("uone"):
        return ""
    return text if all(word in text for word in wanted) else ""


KEPT_APART = {"kimi-k2", "kimi-k2-thinking"}
"""Templates that show of a call what its id says. Calls in the generic syntax are words, too."""


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_what_a_template_takes_is_left_alone_and_of_the_rest_nothing_is_lost(
    adapters: dict[str, Adapter], name: str, tools: list[Message] | None
) -> None:
    style = adapters[name].style
    assert style is not None
    for shape, messages in SHAPES.items():
        text = rendered(adapters[name], messages, tools=tools)
        named = [one["function"]["name"] for one in tools or () if user("uone") in messages]
        assert not [word for word in [*texts(messages), *named] if word not in text], (shape, text)
        taken = as_it_is(name, messages, tools)
        called = tools or any({"tool_calls", "tool_call_id"} & one.keys() for one in messages)
        if taken and name not in KEPT_APART and not (called and style.name == "generic"):
            assert text == taken, shape


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"parts"}))
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


# system messages


@pytest.mark.parametrize(
    "name", ["qwen3.5", "gemma3", "minimax-m2", "devstral2", "smollm3", "deepseek-v3.1"]
)
def test_a_late_system_message_keeps_its_place_so_that_the_prompt_only_grows(
    adapters: dict[str, Adapter], name: str
) -> None:
    """What came before is a prefix, which caches keep."""
    messages = SHAPES["one behind an answer"]
    text = rendered(adapters[name], messages)
    assert text.index("aone") < text.index("stwo") < text.index("utwo")
    without = rendered(adapters[name], [*messages[:3], user("utwo")])
    assert text.split("stwo")[0] == without.split("utwo")[0]


@pytest.mark.parametrize("name", ["gemma2", "mistral-v3"])
def test_a_template_without_a_system_role_has_the_message_in_front_of_the_question(
    adapters: dict[str, Adapter], name: str
) -> None:
    assert "sone\n\nuone" in rendered(adapters[name], SHAPES["a system message"])


# calls

MISTRALS = ["mistral-v3", "mistral-nemo", "mistral-v7", "mistral-small3.2", "magistral"]


@pytest.mark.parametrize("name", MISTRALS)
@pytest.mark.parametrize("names", [["fone"], ["fone", "ftwo"]], ids=["one", "parallel"])
def test_the_servers_own_ids_come_back_as_nine_letters_or_digits(
    adapters: dict[str, Adapter], name: str, names: list[str]
) -> None:
    results = [result(one, f"r{one}") for one in names]
    text = rendered(adapters[name], [user("uone"), calling(*names), *results], tools=TOOLS)
    if "[CALL_ID]" in text:
        called = re.findall(r"\[CALL_ID\](\w+)\[ARGS\]", text)
        answered = re.findall(r"\[TOOL_RESULTS\](\w+)\[TOOL_CONTENT\]", text)
    else:
        called = re.findall(r'"id": "(\w+)"', text)
        answered = re.findall(r'"call_id": "(\w+)"', text)
    assert called == answered
    assert len(set(called)) == len(names)
    assert all(len(one) == 9 for one in called)


def test_ids_that_a_template_takes_stay_as_they_are(adapters: dict[str, Adapter]) -> None:
    given = [user("uone"), calling("fone"), result("fone", "rone")]
    given[1]["tool_calls"][0]["id"] = given[2]["tool_call_id"] = "abcDEF123"
    assert '"call_id": "abcDEF123"' in rendered(adapters["mistral-nemo"], given, tools=TOOLS)


def test_kimi_reads_the_names_of_calls_in_their_ids(adapters: dict[str, Adapter]) -> None:
    text = rendered(adapters["kimi-k2"], SHAPES["two calls one by one"], tools=TOOLS)
    for number, name in enumerate(["fone", "ftwo"]):
        assert f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>" in text
        assert f"## Return of functions.{name}:{number}\nr" in text


def test_an_id_that_is_used_again_means_the_call_before(adapters: dict[str, Adapter]) -> None:
    """As the old `function_call` has it, which has no ids."""
    messages = [
        *(user("uone"), calling("fone"), result("fone", "rone")),
        *(calling("ftwo"), result("ftwo", "rtwo")),
    ]
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["id"] = "call00000"
        if message["role"] == "tool":
            message["tool_call_id"] = "call00000"
    text = rendered(adapters["kimi-k2"], messages, tools=TOOLS)
    assert "Return of functions.fone:0\nrone" in text
    assert "Return of functions.ftwo:1\nrtwo" in text
    text = rendered(adapters["functiongemma"], messages, tools=TOOLS)
    assert text.index("response:fone") < text.index("response:ftwo")


@pytest.mark.parametrize("name", ["granite3.3", "lfm2", "smollm3", "falcon-h1", "phi4-mini"])
def test_calls_that_a_template_does_not_show_are_told_in_the_answer(
    adapters: dict[str, Adapter], name: str
) -> None:
    text = rendered(adapters[name], SHAPES["a call done with"], tools=TOOLS)
    told = text[text.index("uone") : text.index("rone")]
    style = adapters[name].style
    assert style is not None
    assert told.index(style.syntax.start) < told.index("fone") < told.index("argfone")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "deepseek-v3.1", "gemma3", "phi4"])
def test_tools_that_a_template_does_not_show_are_described_with_the_form_of_a_call(
    adapters: dict[str, Adapter], name: str
) -> None:
    style = adapters[name].style
    assert style is not None
    text = rendered(adapters[name], TALK, tools=TOOLS)
    assert text.index(json.dumps(TOOLS[1]["function"])) < text.index(style.syntax.start)
    assert "the function's name" in text


def test_a_template_that_takes_one_call_a_message_gets_each_with_its_result(
    adapters: dict[str, Adapter],
) -> None:
    text = rendered(adapters["llama3"], SHAPES["two calls at once"], tools=TOOLS)
    places = [text.index(word) for word in ("argfone", "rone", "argftwo", "rtwo")]
    assert places == sorted(places)


ARGUMENTS = ["{}", "", " ", '{"zone": "Eur', "[]", "null", {"zone": "Europe"}]


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_arguments_in_the_history_make_a_template_refuse(
    adapters: dict[str, Adapter], name: str
) -> None:
    for arguments in ARGUMENTS:
        function = {"name": "now", "arguments": arguments}
        call = {"id": call_id("now"), "type": "function", "function": function}
        messages = [
            *(user("uone"), {"role": "assistant", "content": None, "tool_calls": [call]}),
            result("now", "noon"),
        ]
        prompt = chat_prompt(messages=messages, tools=[tool("now")])
        text = adapters[name].tokenizer.decode(adapters[name].prepare(prompt, None).tokens)
        assert "noon" in text
        assert "Eur" in text or "Eur" not in str(arguments)


# thoughts

THINKERS = [
    *("qwen3", "qwen3.5", "glm4.5", "glm5", "gemma4", "minimax-m2", "kimi-k2-thinking"),
    *("nemotron3", "seed-oss", "lfm2.5", "command-r7b"),
]


@pytest.mark.parametrize("name", THINKERS)
def test_thoughts_in_front_of_a_call_reach_a_template_that_shows_them(
    adapters: dict[str, Adapter], name: str
) -> None:
    called = calling("fone", reasoning_content="thoughtone")
    text = rendered(adapters[name], [user("uone"), called, result("fone", "rone")], tools=TOOLS)
    assert text.index("uone") < text.index("thoughtone") < text.index("argfone")


def test_a_template_that_knows_a_plan_shows_what_was_said_in_front_of_a_call(
    adapters: dict[str, Adapter],
) -> None:
    called = calling("fone", content="aone", reasoning_content="thoughtone")
    messages = [user("uone"), called, result("fone", "rone")]
    text = rendered(adapters["command-r7b"], messages, tools=TOOLS)
    assert "<|START_THINKING|>thoughtone\n\naone<|END_THINKING|><|START_ACTION|>" in text


# what is refused


def test_a_conversation_that_is_refused_however_it_is_put_is_tried_so_often_and_no_more() -> None:
    messages = [*SHAPES["one behind an answer"], assistant(""), *SHAPES["two calls at once"]] * 3
    tried = list(repaired(messages, REPAIRS, tries=10))
    assert len(tried) == 10
    assert all(one != messages for one in tried)
    assert not list(repaired(TALK, REPAIRS, tries=10))
