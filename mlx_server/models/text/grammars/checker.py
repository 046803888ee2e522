"""Compiles grammars before generation, and locates errors in them."""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from mlx_server.engine.protocol import MOST_ROW_ITEMS, MOST_STEP_ITEMS
from mlx_server.models.store.folder import one_line
from mlx_server.models.text.grammars.json_schema import (
    Unkept,
    child_place,
    inner_schemas,
    patterns,
)
from mlx_server.models.text.grammars.parts import Grammar, json_grammar
from mlx_server.models.text.special_tokens import SpecialTokens
from mlx_server.tokenizer_json import for_grammars

LIMITS = LLParserLimits(
    verbose_errors=False, max_items_in_row=MOST_ROW_ITEMS, step_max_items=MOST_STEP_ITEMS
)
MAX_REASON = 300
CACHED = 512
MAX_FORCED = 100_000
"""Tokens, at which llguidance stops counting."""
MAX_SEARCH = 64
"""Schemas compiled to find a faulty one."""
SHOWN_LINES = re.compile(r"^ *([0-9]+ \|.*|\^)$", re.MULTILINE)
"""Lines in which llguidance quotes the grammar."""
PLAIN_PATTERN = re.compile(r"\^?[^\\^$?\x00-\x1f\x7f]*\$?")


class GrammarChecker:
    """For one model's tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_tokens = sorted(stop_tokens)
        self._lock = threading.Lock()
        self._loaded: LLTokenizer | None = None
        self._errors: OrderedDict[bytes, str] = OrderedDict()

    def prepare(self) -> None:
        """Read the tokenizer, which holds Python's lock. An unusable one is told when used."""
        with suppress(Unkept):
            self._llguidance()

    def special_tokens(self) -> SpecialTokens:
        """Those of llguidance: added tokens of the form `<this>`. Raises Unkept."""
        tokenizer = self._llguidance()
        added = self._tokenizer.get_added_tokens_decoder()
        ids = {token.content: i for i, token in added.items() if tokenizer.is_special_token(i)}
        return SpecialTokens(ids)

    def error_in(self, grammar: str) -> str:
        """Empty if it compiles. Raises Unkept for an unusable tokenizer."""
        key = hashlib.sha256(grammar.encode()).digest()
        tokenizer = self._llguidance()
        with self._lock:
            if key in self._errors:
                self._errors.move_to_end(key)
                return self._errors[key]
        error = _compile_error(grammar, tokenizer)
        with self._lock:
            self._errors[key] = error
            if len(self._errors) > CACHED:
                self._errors.popitem(last=False)
        return error

    def check(self, grammar: Grammar) -> None:
        """Raises Unkept with the place of the faulty schema."""
        error = self._error_alone(grammar)
        if not error:
            return
        schema = grammar.get("json_schema")
        raise Unkept("", error) if schema is None else self._locate(schema, error)

    def check_patterns(self, grammar: Grammar) -> None:
        """Raises Unkept for a pattern that begins a text nothing can complete. llguidance would
        find it only when generation gets there.
        """
        for place, pattern in patterns(grammar.get("json_schema")):
            if isinstance(pattern, str) and PLAIN_PATTERN.fullmatch(pattern):
                continue
            if error := self._error_alone(json_grammar({"type": "string", "pattern": pattern})):
                raise Unkept(place, error)

    def _error_alone(self, grammar: Grammar) -> str:
        return self.error_in(json.dumps({"grammars": [grammar]}, ensure_ascii=False))

    def _locate(self, schema: Any, reason: str) -> Unkept:
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        place, tries = "", MAX_SEARCH
        found: str | None = place
        while found is not None:
            place, found = found, None
            for inner_place, inner in inner_schemas(schema):
                tries -= 1
                if tries < 0 or not isinstance(inner, dict):
                    continue
                if error := self._error_alone(json_grammar({**definitions, **inner})):
                    found = child_place(place, inner_place)
                    schema, reason = inner, error
                    break
        return Unkept(place, reason)

    def _llguidance(self) -> LLTokenizer:
        with self._lock:
            if self._loaded is None:
                try:
                    self._loaded = LLTokenizer(
                        for_grammars(self._tokenizer.to_str().encode()).decode(),
                        eos_token=self._stop_tokens or None,
                    )
                except BaseException as error:
                    # llguidance raises anything for unknown tokenizers, and panics.
                    raise Unkept(
                        "", f"this model's tokenizer cannot be used for it: {one_line(error)}"
                    ) from error
            return self._loaded


def _compile_error(grammar: str, tokenizer: LLTokenizer) -> str:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return _reason(matcher.get_error())
    # The lexer starts with the first mask, and has errors of its own.
    matcher.compute_bitmask()
    if matcher.is_error():
        return _reason(matcher.get_error())
    if matcher.is_stopped() and not matcher.is_accepting():
        return "nothing can match it"
    if len(matcher.compute_ff_tokens()) > MAX_FORCED:
        return "what it must begin with has no end"
    return ""


def _reason(error: str) -> str:
    """Without the lines that quote a grammar the client did not write."""
    if error.startswith("oneOf"):
        return "`oneOf` can be kept only where its schemas exclude each other"
    words = " ".join(SHOWN_LINES.sub("", error).split())
    return words.removeprefix("Unsatisfiable schema: ")[:MAX_REASON].rstrip(".")
