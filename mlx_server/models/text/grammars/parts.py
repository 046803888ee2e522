"""Self-contained grammars in llguidance's format."""

import json
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from mlx_server.models.store.folder import one_line
from mlx_server.models.text.grammars.json_schema import Unkept
from mlx_server.models.text.grammars.recursion import ending_schema
from mlx_server.schemas.internal import Constraint

JSON_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}
r"""`json.dumps` spacing: small models allowed white space write little else. `\u` is excluded,
since a key spelled another way escapes `properties`.
"""
MAX_TEXT = 256 * 1024
"""Characters."""
GRAMMAR_HEAD = "%llguidance {}"

Grammar = dict[str, Any]


def json_grammar(strict: Any) -> Grammar:
    schema = strict if isinstance(strict, dict) else ({} if strict else {"enum": []})
    return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}


def lark_grammar(rules: str) -> Grammar:
    return {"lark_grammar": f"{GRAMMAR_HEAD}\n{rules}"}


def constraint_grammar(constraint: Constraint) -> Grammar:
    """Raises Unkept."""
    value = constraint.value
    match constraint.kind:
        case "json_schema":
            _check_length(json.dumps(value))
            return json_grammar(ending_schema(value))
        case "json_object":
            return json_grammar({"type": "object"})
        case "regex":
            _check_length(value)
            return lark_grammar(f"start: /{_whole(value)}/")
        case "choice":
            _check_length("".join(value))
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
            # A terminal, since the parser limits alternatives of rules.
            return lark_grammar(f"start: CHOICE\nCHOICE: {choices}")
        case "grammar":
            _check_length(value)
            return {"lark_grammar": _as_lark(value)}


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise Unkept("", f"it has {len(text)} characters, and {MAX_TEXT} are possible")


def _whole(regex: str) -> str:
    """For Lark, which matches whole texts without anchors."""
    bare = regex.removeprefix("^")
    if bare.endswith("$") and (len(bare) - len(bare[:-1].rstrip("\\"))) % 2 == 1:
        bare = bare[:-1]
    return str(regex_to_lark(bare, "")) or "()"


def _as_lark(grammar: str) -> str:
    try:
        return any_to_lark(grammar)
    except Exception as error:
        # The GBNF converter raises anything on a bad grammar.
        raise Unkept("", f"it is neither Lark nor GBNF: {one_line(error)}") from error
