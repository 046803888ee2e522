"""Custom tools: their grammars as patterns, and their inputs out of a call's arguments."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.api.openai.custom_tools import InputReader
from mlx_server.models.text.grammars.json_schema import Unkept
from mlx_server.models.text.grammars.regular import pattern_of, whole_pattern

SUMS = """
start: sum  // of numbers
sum: product (("+"|"-") product)*
?product.2: NUMBER | "(" sum ")" -> nested
%import common.NUMBER
%import common.WS_INLINE
%ignore WS_INLINE
"""

PATCH = """
start: begin change+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
change: added | removed | updated
added: "*** Add File: " name LF ("+" /(.*)/ LF)+
removed: "*** Delete File: " name LF
updated: "*** Update File: " name LF ("*** Move to: " name LF)? (place | line)+ last?
name: /(.+)/
place: ("@@" | "@@ " /(.+)/) LF
line: ("+" | "-" | " ") /(.*)/ LF
last: "*** End of File" LF
%import common.LF
"""
"""Like the one that coding agents send for their edits."""
EDIT = """*** Begin Patch
*** Update File: greet.py
@@ def greet():
-    print("hello")
+    print("good morning")
*** End Patch
"""


@pytest.mark.parametrize(
    ("grammar", "text", "fits"),
    [
        (PATCH, EDIT, True),
        (PATCH, EDIT.replace("@@ def greet():\n", ""), True),
        (PATCH, EDIT.replace("-    print", "    print"), True),
        (PATCH, EDIT.replace("-    print", "print"), False),
        (PATCH, EDIT.replace("*** End Patch\n", ""), False),
        (SUMS, "1 + (2-3)", True),
        (SUMS, "((((1))))", True),
        (SUMS, "1+", False),
        (SUMS, "2 2", False),
        ('start: "a"i~2 ["b"]', "aAb", True),
        ('start: "a"~1..3', "aaaa", False),
        ('start: "0".."9" | X\nX: /x./s', "x\n", True),
        ('start: "0".."9" | X\nX: /x./', "x\n", False),
        (r'start: "\\ \"\n" "."', '\\ "\n.', True),
        (r"start: /a\/b/", "a/b", True),
        ("start: (A | B)+\n%import common (INT, WORD)\nA: INT\nB: WORD", "ab12", True),
        ('start: a\na: "x" a | "y"', "xxxy", True),
        ('%llguidance {}\nstart: "x"', "x", True),
    ],
)
def test_a_lark_grammar_becomes_a_pattern(grammar: str, text: str, fits: bool) -> None:
    assert bool(re.search(whole_pattern(pattern_of(grammar)), text)) == fits


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "start",
        "start: a",
        "start: start",
        'start: "a" "b" )',
        'start: "a"~3..2',
        'start: "a"~9999',
        "start: X\n%import common.NONE",
        "start: X\n%declare X",
        'start: "b".."a"',
        "start: " + "(" * 200 + '"a"' + ")" * 200,
        "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)), 'r60: "a"']),
        "\n".join(["start: r0", *(f"r{i}: r{i + 1} | r{i + 1}" for i in range(60)), 'r60: "a"']),
    ],
)
def test_a_grammar_that_cannot_be_kept_is_refused_in_time(grammar: str) -> None:
    with pytest.raises(Unkept):
        pattern_of(grammar)


def read(arguments: str, size: int) -> str:
    reader = InputReader()
    pieces = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    return "".join([*map(reader.push, pieces), reader.finish()])


@given(st.text(), st.integers(1, 20), st.booleans())
def test_an_input_is_read_whole_however_its_arguments_are_cut(
    text: str, size: int, ascii_only: bool
) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    assert read(arguments, size) == text


@pytest.mark.parametrize("arguments", ["ls", '{"command": "ls"}', "[1]", '{"input": 1}', ""])
def test_arguments_in_another_form_are_all_input(arguments: str) -> None:
    assert read(arguments, 3) == arguments


def test_an_input_comes_as_it_is_written() -> None:
    reader = InputReader()
    told = [reader.push(piece) for piece in ('{"inp', 'ut": "a', "b\\", 'n"', "}")]
    assert told == ["", "a", "b", "\n", ""]
