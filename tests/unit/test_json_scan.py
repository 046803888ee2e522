"""The scan of JSON that comes in pieces, against a parser that sees it whole."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.services.output.json_scan import ObjectScan, find_header
from tests.support.outputs import pieces_of

TEXTS = st.text(st.sampled_from('ab"\\{}[]<>日 \n'), max_size=6)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
SIZES = st.lists(st.integers(0, 6), max_size=60)


def scanned(pieces: Sequence[str], marker: str) -> tuple[str, bool]:
    """What belongs to the object, and whether its end was found."""
    scan = ObjectScan(marker)
    taken = held = ""
    for piece in pieces:
        held += piece
        length, ended = scan.push(held)
        taken, held = taken + held[:length], held[length:]
        if ended:
            return taken, True
    return taken, False


@given(value=OBJECTS, sizes=SIZES, rest=TEXTS, marker=st.sampled_from(["</a>", ""]))
def test_an_object_ends_where_a_parser_ends_it_however_it_is_cut(
    value: dict[str, Any], sizes: list[int], rest: str, marker: str
) -> None:
    written = json.dumps(value, ensure_ascii=False)
    assert scanned(pieces_of(written + rest, sizes), marker) == (written, True)


@given(value=OBJECTS, sizes=SIZES)
def test_a_marker_ends_an_object_that_is_not_closed(
    value: dict[str, Any], sizes: list[int]
) -> None:
    begun = json.dumps(value, ensure_ascii=False)[:-1]
    assert scanned(pieces_of(begun + "</a>}", sizes), "</a>") == (begun, True)


def test_what_may_begin_the_marker_is_not_certain() -> None:
    scan = ObjectScan("</a>")
    assert scan.push('{"k": "</a') == (len('{"k": "</a'), False)
    assert scan.push('" <') == (len('" '), False)
    assert scan.push("<b") == (len("<b"), False)


HEADER = ' [ {"name": "a\\u0064d", "arguments": {'


def test_a_header_is_found_as_soon_as_it_is_whole() -> None:
    for length in range(len(HEADER)):
        assert find_header(HEADER[:length]) is None
    assert find_header(HEADER + '"x": 1}}') == ("add", len(HEADER) - 1)


@pytest.mark.parametrize(
    "text",
    ["x", "{}", "[[", '{"args"', '{"name": 1', '{"name": "a"}', '{"name": "a", "other"',
     '{"name": "a", "arguments": [', '{"name": "a", "arguments": "'],
)  # fmt: skip
def test_another_key_or_value_is_no_header(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        find_header(text)
