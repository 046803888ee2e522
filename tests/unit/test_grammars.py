"""Constraints at the boundary of the text side: what its grammars accept, and what is refused."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from mlx_server.errors import BadRequest
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.syntax import Thinking
from mlx_server.schemas.internal import ChatPrompt, Constraint, TextPrompt
from tests.support.tiny import build_tiny_model

MODELS = ("generic", "gemma")
"""Tokenizers of both kinds: bytes as characters, and pieces with bytes as a fallback."""


def tiny_adapter(folder: Path, family: str, **extras: Any) -> Adapter:
    """The adapter of a tiny model, which is written to `folder`."""
    return load_adapter(build_tiny_model(folder, family, **extras), f"test/tiny-{family}")


@lru_cache(maxsize=4)
def tokens_of(adapter: Adapter) -> LLTokenizer:
    """The adapter's tokens as grammars see them. They take long to make."""
    return LLTokenizer(adapter.tokenizer.backend.to_str(), eos_token=sorted(adapter.stop_tokens))


class Speaker:
    """Says things under a grammar, as an engine would let it."""

    def __init__(self, adapter: Adapter, grammar: str | None) -> None:
        assert grammar is not None
        self._adapter = adapter
        self._tokens = tokens_of(adapter)
        self._matcher = LLMatcher(self._tokens, grammar)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def says(self, *texts: str) -> bool:
        """Whether one after the other may be said, each tokenized by itself."""
        return all(
            self._matcher.try_consume_tokens(tokens) == len(tokens)
            for tokens in map(self._tokens_of, texts)
        )

    def _tokens_of(self, text: str) -> list[int]:
        tokens = self._adapter.tokenizer.encode_bare(text)
        if self._tokens.decode_str(tokens) == f" {text}":
            # SentencePiece puts a space in front of a text, which nobody said.
            tokens = self._tokens.greedy_tokenize(text)
        return tokens

    def may_end(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def allowed(self) -> set[int]:
        """The tokens that may come next."""
        mask = self._matcher.compute_bitmask()
        size = self._tokens.vocab_size
        return {token for token in range(size) if mask[token // 8] >> token % 8 & 1}


def accepts(adapter: Adapter, grammar: str | None, *texts: str) -> bool:
    """Whether these texts, said one after the other, are a whole answer."""
    speaker = Speaker(adapter, grammar)
    return speaker.says(*texts) and speaker.may_end()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """An adapter for each of MODELS."""
    folder = tmp_path_factory.mktemp("grammars")
    return {family: tiny_adapter(folder / family, family) for family in MODELS}


@pytest.fixture
def adapter(adapters: dict[str, Adapter]) -> Adapter:
    return adapters["generic"]


def constraint(kind: Any, value: Any) -> Constraint:
    return Constraint(kind, value, "response_format")


def grammar_of(adapter: Adapter, kind: str, value: Any) -> str | None:
    return adapter.prepare(TextPrompt(""), constraint(kind, value)).grammar


def refusal(adapter: Adapter, kind: str, value: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        grammar_of(adapter, kind, value)
    assert refused.value.param == "response_format"
    assert "\n" not in refused.value.message
    return refused.value


# what is accepted

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
PET = {
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "discriminator": {"propertyName": "kind"},
    "$defs": {
        "cat": {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
            "required": ["kind", "lives"],
        },
        "dog": {
            "type": "object",
            "properties": {"kind": {"const": "dog"}},
            "required": ["kind"],
        },
    },
}
ACCEPTED = [
    ("json_schema", PERSON, ['{"name": "Ä\\"🦙", "age": 7}', '{"name": ""}'], ['{"age": 7}', "{}"]),
    ("json_schema", PERSON, [], ['{"name": "a", "age": -1}', '{"name":"a"}', '{ "name": "a"}']),
    ("json_schema", PET, ['{"kind": "cat", "lives": 9}', '{"kind": "dog"}'], ['{"kind": "cat"}']),
    ("json_schema", {"type": "string", "pattern": "b+"}, ['"abc"'], ['"ac"']),
    (
        "json_schema",
        {"type": "string", "pattern": r"^\W[^\d]$"},
        ['"-a"'],
        ['"äa"', '"-3"', '"-٣"'],
    ),
    (
        "json_schema",
        {"type": "string", "pattern": r"^[\D]\w[^\W]$"},
        ['"abc"'],
        ['"3bc"', '"٣bc"', '"aäb"'],
    ),
    ("json_schema", {"type": "string", "pattern": r"^\[\W\]\\d$"}, [r'"[!]\\d"'], ['"[!]3"']),
    ("json_schema", {"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"']),
    ("json_schema", {"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"23:59:60Z"']),
    ("json_schema", {"type": "integer", "format": "int64"}, ["12"], ["1.5"]),
    (
        "json_schema",
        {"patternProperties": {"^\\W$": {"type": "null"}}, "additionalProperties": False},
        ['{"!": null}', "{}"],
        ['{"!": 1}', '{"ä": null}'],
    ),
    ("json_schema", {"uniqueItems": False, "maxItems": 2}, ["[1, 1]"], ["[1, 1, 1]"]),
    ("json_schema", True, ['{"a": [null, 1.5]}', "1"], ["{"]),
    ("json_object", None, ['{"a": 1}', "{}"], ["[]", "1"]),
    ("regex", "^[a-z]{3}-\\d+$", ["abc-12"], ["abcd-1", "abc-12 "]),
    ("regex", "a/b|\\$", ["a/b", "$"], ["a", "b"]),
    ("choice", ["yes", "no", 'a "b" 🦙'], ["yes", 'a "b" 🦙'], ["ye", "yesno"]),
    ("grammar", 'start: "a" NUMBER\nNUMBER: /[0-9]+/', ["a12"], ["a"]),
    ("grammar", 'root ::= item+\nitem ::= "(" root ")" | "x"', ["(x(xx))"], ["(x"]),
]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("kind", "value", "good", "bad"), ACCEPTED)
def test_an_answer_is_bound_from_first_to_last_character(
    adapters: dict[str, Adapter],
    family: str,
    kind: str,
    value: Any,
    good: list[str],
    bad: list[str],
) -> None:
    adapter = adapters[family]
    grammar = grammar_of(adapter, kind, value)
    assert all(accepts(adapter, grammar, text) for text in good)
    assert not any(accepts(adapter, grammar, text) for text in bad)


def test_a_key_cannot_be_spelled_in_a_way_that_escapes_its_schema(adapter: Adapter) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    grammar = grammar_of(adapter, "json_schema", schema)
    assert accepts(adapter, grammar, '{"b": "x"}')
    assert not accepts(adapter, grammar, r'{"\u0061": "x"}')


def test_white_space_cannot_go_on_for_ever(adapter: Adapter) -> None:
    speaker = Speaker(adapter, grammar_of(adapter, "json_object", None))
    assert not speaker.says("\n")
    assert speaker.says('{"a": ')
    assert not speaker.says(" ")


def test_a_client_cannot_turn_strictness_off(adapter: Adapter) -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "object", "required": ["a"]}
    grammar = grammar_of(adapter, "json_schema", schema)
    assert not accepts(adapter, grammar, "{}")
    assert not accepts(adapter, grammar, '{"a":  1}')


# what is refused

NESTED = {"type": "array", "items": {"type": "object", "properties": {"b": None}}}
REFUSED = [
    ({"not": {}}, "not"),
    ({"if": {}, "then": False}, "if"),
    ({"contains": {"const": 1}}, "contains"),
    ({"uniqueItems": True}, "uniqueItems"),
    ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
    ({"dependencies": {"a": ["b"]}}, "dependencies"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"minProperties": 2}, "minProperties"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"type": "string", "format": "password"}, "format"),
    ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
    ({"type": "string", "pattern": "^\\x01$"}, "pattern"),
    ({"const": "\x01"}, "const"),
    ({"$ref": "https://example.com/schema"}, "$ref"),
    ({"$ref": "#/properties/missing"}, "$ref"),
    ({"properties": []}, "properties"),
    ({"items": 1}, "items"),
    ({"type": "thing"}, ""),
    ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, ""),
    ({"patternProperties": {"^a": {"type": "null"}, "b$": {"type": "string"}}}, ""),
]


@pytest.mark.parametrize(("inner", "place"), REFUSED)
def test_a_schema_that_cannot_be_kept_is_refused_by_its_place(
    adapter: Adapter, inner: dict[str, Any], place: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": inner}}}
    whole = "properties.a.items" + (f".{place}" if place else "")
    assert f"`{whole}`" in refusal(adapter, "json_schema", schema).message


@pytest.mark.parametrize("draft", ["http://json-schema.org/draft-04/schema#", None])
def test_a_keyword_is_not_ignored_because_a_draft_does_not_know_it(
    adapter: Adapter, draft: str | None
) -> None:
    for keyword in ({"contains": {}}, {"dependencies": {"a": ["b"]}}, {"divisibleBy": 2}):
        schema = {**({"$schema": draft} if draft else {}), **keyword}
        assert next(iter(keyword)) in refusal(adapter, "json_schema", schema).message


def test_names_of_properties_are_no_keywords(adapter: Adapter) -> None:
    schema = {"type": "object", "properties": {"not": {"type": "null"}, "$ref": {"const": "if"}}}
    grammar = grammar_of(adapter, "json_schema", schema)
    assert accepts(adapter, grammar, '{"not": null, "$ref": "if"}')


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", False),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}),
        ("json_schema", deep(100)),
        ("json_schema", {"enum": ["x" * 300_000]}),
        ("regex", "x(?=y)"),
        ("regex", "["),
        ("regex", "a\\b"),
        ("grammar", "no grammar"),
        ("grammar", "start: missing"),
        ("grammar", "start: start"),
        ("grammar", 'root ::= "a'),
        ("grammar", "root ::= " + "(" * 5000),
        ("grammar", "x" * 300_000),
    ],
)
def test_a_constraint_that_cannot_be_compiled_is_refused(
    adapter: Adapter, kind: str, value: Any
) -> None:
    assert refusal(adapter, kind, value)


def test_a_tokenizer_that_grammars_cannot_read_refuses_constraints_alone(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path, "generic")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    adapter = load_adapter(folder, "x")
    assert adapter.prepare(ChatPrompt([{"role": "user", "content": "Hi"}]), None).tokens
    assert "tokenizer" in refusal(adapter, "json_object", None).message


# thinking


def user(text: str, **options: Any) -> ChatPrompt:
    return ChatPrompt([{"role": "user", "content": text}], **options)


YES = constraint("choice", ["yes"])


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("thinkers")
    spelled = "{#- <think></think> -#}"
    families = {
        "qwen": {},
        "qwen-thinking": {},
        "mistral-headers": {},
        "gemma-tools": {},
        "llama": {"template": spelled + "{{- messages[0].content }}"},
    }
    return {name: tiny_adapter(folder / name, name, **extra) for name, extra in families.items()}


MARKERS = {
    "qwen": ("<think>", "</think>"),
    "mistral-headers": ("[THINK]", "[/THINK]"),
    "gemma-tools": ("<|channel>thought", "<channel|>"),
    "llama": ("<think>", "</think>"),
}


@pytest.mark.parametrize("family", MARKERS)
def test_a_constraint_binds_the_answer_and_not_the_thinking(
    thinkers: dict[str, Adapter], family: str
) -> None:
    adapter, (start, end) = thinkers[family], MARKERS[family]
    prepared = adapter.prepare(user("Hi"), YES)
    assert prepared.thinking is Thinking.POSSIBLE
    assert accepts(adapter, prepared.grammar, start, "Is it? {no}", end, "\n\n", "yes")
    assert accepts(adapter, prepared.grammar, "yes")
    assert not accepts(adapter, prepared.grammar, start, "Hm", end, "no")
    assert not accepts(adapter, prepared.grammar, start, "yes")


def test_a_spelled_end_of_thinking_does_not_slip_past_the_constraint(
    thinkers: dict[str, Adapter],
) -> None:
    adapter = thinkers["qwen"]
    speaker = Speaker(adapter, adapter.prepare(user("Hi"), YES).grammar)
    assert speaker.says("<think>", "Hm", "<", "/", "th", "ink")
    assert not speaker.says(">")


def test_a_block_that_the_template_opens_is_open(thinkers: dict[str, Adapter]) -> None:
    adapter = thinkers["qwen-thinking"]
    prepared = adapter.prepare(user("What does </think> mean?"), YES)
    assert prepared.thinking is Thinking.OPEN
    assert accepts(adapter, prepared.grammar, "Hm", "</think>", "\n\n", "yes")
    assert not accepts(adapter, prepared.grammar, "yes")


@pytest.mark.parametrize("family", ["qwen", "qwen-thinking"])
def test_thinking_that_the_template_closes_is_over(
    thinkers: dict[str, Adapter], family: str
) -> None:
    adapter = thinkers[family]
    prompt = user("What does <think> mean?", template_kwargs={"enable_thinking": False})
    prepared = adapter.prepare(prompt, YES)
    assert prepared.thinking is Thinking.DONE
    assert accepts(adapter, prepared.grammar, "yes")
    assert not Speaker(adapter, prepared.grammar).says("<think>")


@pytest.mark.parametrize(
    ("said", "thinking"),
    [
        ("<think>\nHm", Thinking.OPEN),
        ("<think>\nHm</think>\n\nYes", Thinking.DONE),
        ("Yes", Thinking.DONE),
    ],
)
def test_a_continued_answer_says_itself_whether_it_thinks(
    thinkers: dict[str, Adapter], said: str, thinking: Thinking
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    prepared = thinkers["qwen"].prepare(ChatPrompt(messages, continue_final=True), None)
    assert prepared.thinking is thinking


def test_an_answer_that_nothing_binds_has_no_grammar(thinkers: dict[str, Adapter]) -> None:
    for adapter in thinkers.values():
        assert adapter.prepare(user("Hi"), None).grammar is None


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("bound", [None, YES])
@pytest.mark.parametrize("family", ["qwen", "qwen-thinking", "mistral-headers"])
def test_a_budget_ends_the_thinking_and_nothing_else(
    thinkers: dict[str, Adapter], family: str, budget: int, bound: Constraint | None
) -> None:
    adapter = thinkers[family]
    prepared = adapter.prepare(user("Hi", thinking_budget=budget), bound)
    speaker = Speaker(adapter, prepared.grammar)
    reasoning = adapter.syntax.reasoning
    assert reasoning is not None
    if prepared.thinking is not Thinking.OPEN:
        assert speaker.says(reasoning.start)
    assert all(speaker.says("x") for _ in range(budget))
    assert speaker.allowed() == {adapter.tokenizer.token_id(reasoning.end)}
    assert speaker.says(reasoning.end)
    assert speaker.says("yes")
    assert speaker.may_end()
    assert speaker.says("x" * 20) is (bound is None)


def test_a_budget_that_the_markers_cannot_keep_is_refused(thinkers: dict[str, Adapter]) -> None:
    with pytest.raises(BadRequest) as refused:
        thinkers["llama"].prepare(user("Hi", thinking_budget=5), None)
    assert refused.value.param == "thinking_budget"


def test_a_budget_leaves_an_answer_without_thinking_alone(thinkers: dict[str, Adapter]) -> None:
    adapter = thinkers["qwen"]
    grammar = adapter.prepare(user("Hi", thinking_budget=2), None).grammar
    assert accepts(adapter, grammar, "A long answer, <tool_call> and all", "<|im_start|>")
    closed = user("Hi", thinking_budget=2, template_kwargs={"enable_thinking": False})
    assert adapter.prepare(closed, None).grammar is None
