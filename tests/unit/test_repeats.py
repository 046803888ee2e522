"""Repeated calls are left out, and nothing else is changed."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.services.output.pieces import Kind, Piece
from mlx_server.services.output.repeats import RepeatFilter


def pieces_of(calls: Sequence[tuple[str, str]], cut: int = 1) -> list[Piece]:
    """As a reader gives them: arguments `cut` characters at a time, hidden marks between calls."""
    pieces = []
    for name, arguments in calls:
        pieces.append(Piece(Kind.HIDDEN, "", 9))
        pieces.append(Piece(Kind.CALL, name, 0))
        for start in range(0, len(arguments), cut):
            part = arguments[start : start + cut]
            pieces.append(Piece(Kind.ARGUMENTS, part, len(part)))
    return pieces


def told(pieces: Sequence[Piece]) -> tuple[list[list[str]], bool]:
    """The calls that are told, and whether one is repeated."""
    repeats = RepeatFilter()
    calls: list[list[str]] = []
    for piece in [piece for one in pieces for piece in repeats.push([one])] + repeats.end_call():
        if piece.kind is Kind.CALL:
            calls.append([piece.text, ""])
        elif piece.kind is Kind.ARGUMENTS:
            calls[-1][1] += piece.text
    return calls, repeats.repeated


@pytest.mark.parametrize("cut", [1, 3, 100])
def test_a_call_that_repeats_one_is_left_out_with_all_that_follows(cut: int) -> None:
    first, second = ("add", '{"a": 1}'), ("add", '{"a": 12}')
    said = pieces_of([first, second, ("sub", '{"a": 1}'), first, ("add", '{"a": 3}')], cut)
    calls = [list(first), list(second), ["sub", '{"a": 1}']]
    assert told(said) == (calls, True)
    assert told(pieces_of([first, first], cut)) == ([list(first)], True)


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from("fg"), st.sampled_from(["{}", '{"a": 1}', '{"a": 12}', "x", "xy"])
        ),
        unique=True,
    ),
    cut=st.integers(1, 9),
)
def test_calls_that_differ_stay_to_the_letter(calls: list[tuple[str, str]], cut: int) -> None:
    assert told(pieces_of(calls, cut)) == ([list(call) for call in calls], False)
    repeats = RepeatFilter()
    pieces = pieces_of(calls, cut)
    assert repeats.push(pieces) + repeats.end_call() == pieces


def test_half_a_call_is_told_though_it_begins_like_another() -> None:
    half = pieces_of([("add", '{"a": 1}'), ("add", '{"a":')])
    assert told(half) == ([["add", '{"a": 1}'], ["add", '{"a":']], False)


def test_a_call_is_told_as_soon_as_it_differs() -> None:
    repeats = RepeatFilter()
    repeats.push(pieces_of([("add", '{"a": 1}')]))
    assert repeats.push(pieces_of([("add", '{"a": ')])) == [Piece(Kind.HIDDEN, "", 9)]
    assert [piece.kind for piece in repeats.push([Piece(Kind.ARGUMENTS, "2", 1)])] == [
        Kind.CALL,
        *[Kind.ARGUMENTS] * 7,
    ]
    assert repeats.push([Piece(Kind.ARGUMENTS, "}", 1)]) == [Piece(Kind.ARGUMENTS, "}", 1)]
