"""Grammars that completions are bound to, as llguidance reads them.

A grammar is put together from a Lark text and named parts (schemas, and grammars of the client's),
and then checked with the model's own tokenizer, before anything is generated.
"""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark
from tokenizers import Tokenizer

from mlx_server.engine.protocol import MOST_ROW_ITEMS, MOST_STEP_ITEMS
from mlx_server.models.store.folder import one_line
from mlx_server.models.text.grammars.json_schema import (
    Unkept,
    child_place,
    inner_schemas,
    patterns,
    strict_schema,
)
from mlx_server.schemas.internal import Constraint

JSON_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}
"""One space after a comma and a colon, as `json.dumps` writes, and none elsewhere: a small model
that may write white space writes little else. Without `\\u` a text can be written in one way only:
a key that is spelled otherwise would not be told from those that the schema names."""
LIMITS = LLParserLimits(
    verbose_errors=False, max_items_in_row=MOST_ROW_ITEMS, step_max_items=MOST_STEP_ITEMS
)
MAX_TEXT = 256 * 1024
"""Characters of a schema or a grammar."""
MAX_REASON = 300
CHECKED = 512
"""Grammars whose outcome is remembered."""
LONGEST_SEARCH = 64
"""Schemas that are compiled one by one at most, to find the one at fault."""
GRAMMAR_HEAD = "%llguidance {}"
SHOWN_LINES = re.compile(r"^ *([0-9]+ \|.*|\^)$", re.MULTILINE)
PLAIN_PATTERN = re.compile(r"\^?[^\\^$?\x00-\x1f\x7f]*\$?")
"""A pattern that is not obscure enough to match nothing that can be written."""
ANY_TEXT = "/(?s:.*)/"


class Lark:
    """A grammar in the making: rules of Lark, and parts that they name."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._parts: dict[str, str] = {}

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Add a rule, unless there is the same, and return the name it got.

        As in Lark, a name in capitals makes it a terminal. `options` are llguidance's.
        """
        definition = f"{options}: {body}"
        return self._rules.setdefault(definition, f"{name}_{len(self._rules)}")

    def part(self, grammar: dict[str, Any]) -> str:
        """Add a grammar of its own, and return the symbol for it."""
        text = json.dumps(grammar, ensure_ascii=False)
        return "@" + self._parts.setdefault(text, f"part_{len(self._parts)}")

    def schema(self, strict: Any) -> str:
        """Add JSON that a schema from `strict_schema` allows, and return the symbol for it."""
        return self.part(json_grammar(strict))

    def text(self, start: str) -> str:
        """The grammar that begins with the symbol `start`, as llguidance reads it."""
        rules = [f"{name}{definition}" for definition, name in self._rules.items()]
        main = {"lark_grammar": "\n".join([GRAMMAR_HEAD, f"start: {start}", *rules])}
        parts = [{"name": name, **json.loads(text)} for text, name in self._parts.items()]
        return json.dumps({"grammars": [main, *parts]}, ensure_ascii=False)


def quoted(text: str) -> str:
    """`text` as a literal of Lark; nothing where there is none."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def text_without(*texts: str) -> str:
    """A terminal: any text in which none of `texts` stands."""
    return " & ".join([ANY_TEXT, *(f"~({ANY_TEXT} {quoted(text)} {ANY_TEXT})" for text in texts)])


def json_grammar(strict: Any) -> dict[str, Any]:
    """The grammar of the JSON that a schema from `strict_schema` allows."""
    schema = strict if isinstance(strict, dict) else ({} if strict else {"enum": []})
    return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}


def constraint_grammar(constraint: Constraint) -> dict[str, Any]:
    """The grammar of a whole answer. Raises Unkept."""
    value = constraint.value
    match constraint.kind:
        case "json_schema":
            _check_length(json.dumps(value))
            return json_grammar(strict_schema(value))
        case "json_object":
            return json_grammar({"type": "object"})
        case "regex":
            _check_length(value)
            return {"lark_grammar": f"{GRAMMAR_HEAD}\nstart: /{_whole(value)}/"}
        case "choice":
            _check_length("".join(value))
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
            # A terminal, since the parser takes only so many rules at a place.
            return {"lark_grammar": f"{GRAMMAR_HEAD}\nstart: CHOICE\nCHOICE: {choices}"}
        case "grammar":
            _check_length(value)
            return {"lark_grammar": _as_lark(value)}


class Grammars:
    """Checks grammars with one model's tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._stop_tokens = sorted(stop_tokens)
        self._lock = threading.Lock()
        self._ready: LLTokenizer | None = None
        self._outcomes: OrderedDict[bytes, str] = OrderedDict()

    def special_tokens(self) -> dict[str, int]:
        """Ids, by their texts, of the tokens that are no text to llguidance. Raises Unkept.

        These are more than the special ones: all that were added and look like `<this>`.
        """
        tokenizer = self._llguidance()
        return {t.content: i for i, t in self._added.items() if tokenizer.is_special_token(i)}

    def check(self, grammar: str) -> str:
        """What is wrong with `grammar`, "" if nothing. Raises Unkept when none can be used."""
        key = hashlib.sha256(grammar.encode()).digest()
        tokenizer = self._llguidance()
        with self._lock:
            if key in self._outcomes:
                self._outcomes.move_to_end(key)
                return self._outcomes[key]
        outcome = _compile(grammar, tokenizer)
        with self._lock:
            self._outcomes[key] = outcome
            if len(self._outcomes) > CHECKED:
                self._outcomes.popitem(last=False)
        return outcome

    def check_part(self, grammar: dict[str, Any]) -> None:
        """Raise Unkept, with the place if it is in a schema, when `grammar` cannot be used."""
        outcome = self._check_alone(grammar)
        if not outcome:
            return
        schema = grammar.get("json_schema")
        raise Unkept("", outcome) if schema is None else self._locate(schema, outcome)

    def check_patterns(self, grammar: dict[str, Any]) -> None:
        """Raise Unkept when a text could begin that nothing can complete.

        llguidance tells that of a pattern by itself, and not of one within a document, where it
        would only show as the model gets there.
        """
        for place, pattern in patterns(grammar.get("json_schema")):
            if isinstance(pattern, str) and PLAIN_PATTERN.fullmatch(pattern):
                continue
            if failure := self._check_alone(json_grammar({"type": "string", "pattern": pattern})):
                raise Unkept(place, failure)

    def _check_alone(self, grammar: dict[str, Any]) -> str:
        return self.check(json.dumps({"grammars": [grammar]}, ensure_ascii=False))

    def _locate(self, schema: Any, reason: str) -> Unkept:
        """The innermost schema that fails by itself."""
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        place, tries = "", LONGEST_SEARCH
        found: str | None = place
        while found is not None:
            place, found = found, None
            for inner_place, inner in inner_schemas(schema):
                tries -= 1
                if tries < 0 or not isinstance(inner, dict):
                    continue
                if failure := self._check_alone(json_grammar({**definitions, **inner})):
                    found = child_place(place, inner_place)
                    schema, reason = inner, failure
                    break
        return Unkept(place, reason)

    def _llguidance(self) -> LLTokenizer:
        with self._lock:
            if self._ready is None:
                try:
                    self._ready = LLTokenizer(
                        self._tokenizer.to_str(), eos_token=self._stop_tokens or None
                    )
                except Exception as error:
                    # Whatever llguidance finds in a tokenizer that it does not know.
                    raise Unkept(
                        "", f"this model's tokenizer cannot be used for it: {one_line(error)}"
                    ) from error
            return self._ready


def _compile(grammar: str, tokenizer: LLTokenizer) -> str:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return _reason(matcher.get_error())
    # What only shows when the lexer starts shows with the first mask.
    matcher.compute_bitmask()
    if matcher.is_error():
        return _reason(matcher.get_error())
    if matcher.is_stopped() and not matcher.is_accepting():
        return "nothing can match it"
    return ""


def _reason(error: str) -> str:
    """llguidance's words, without the lines in which it shows the grammar that was made here."""
    if error.startswith("oneOf"):
        return "`oneOf` can be kept only where its schemas exclude each other"
    words = " ".join(SHOWN_LINES.sub("", error).split())
    return words.removeprefix("Unsatisfiable schema: ")[:MAX_REASON].rstrip(".")


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise Unkept("", f"it has {len(text)} characters, and {MAX_TEXT} are possible")


def _whole(regex: str) -> str:
    """An expression for Lark; the anchors that a match of the whole text needs not are left out."""
    bare = regex.removeprefix("^")
    if bare.endswith("$") and (len(bare) - len(bare[:-1].rstrip("\\"))) % 2 == 1:
        bare = bare[:-1]
    return str(regex_to_lark(bare, "")) or "()"


def _as_lark(grammar: str) -> str:
    try:
        return any_to_lark(grammar)
    except Exception as error:
        # The converter from GBNF fails in as many ways as a grammar can be wrong.
        raise Unkept("", f"it is neither Lark nor GBNF: {one_line(error)}") from error
