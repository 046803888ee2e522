"""Stop strings in streaming text, against a reference that sees the whole text at once."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.services.output.stops import StopMatcher
from tests.support.outputs import pieces_of

STOPS = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that ends first starts; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop)
    return None


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """How long the longest end of `text` is that begins a stop string."""
    lengths = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


@given(
    text=st.text(st.sampled_from("abc"), max_size=40),
    stops=STOPS,
    sizes=st.lists(st.integers(0, 5), max_size=20),
)
def test_stops_are_found_however_the_text_is_cut(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher = StopMatcher(stops)
    cut = first_stop(text, stops)
    seen = shown = ""
    for piece in pieces_of(text, sizes):
        seen += piece
        more, stopped = matcher.push(piece)
        shown += more
        if stopped:
            assert cut is not None
            assert shown == text[:cut]
            assert matcher.found in stops
            assert text.startswith(matcher.found, cut)
            return
        assert shown == seen[: len(seen) - longest_beginning(seen, stops)]
    assert cut is matcher.found is None
    assert shown + matcher.flush() == text


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["STOP"], ["a S", "TO", "P b"], "a "),
        (["\n\n"], ["a \n", " \n", "\nb"], "a \n "),
        (["abcd", "bc"], ["xabcd"], "xa"),
        (["bc", "abc"], ["xabc"], "x"),
        (["aab"], ["aaab"], "a"),
        (["🦙"], ["hi 🦙"], "hi "),
        (["a.c", "["], ["abc ["], "abc "),
        (["", "x"], ["a", "x"], "a"),
    ],
)
def test_the_stop_that_ends_first_cuts_and_white_space_stays(
    stops: list[str], pieces: list[str], shown: str
) -> None:
    matcher = StopMatcher(stops)
    results = [matcher.push(piece) for piece in pieces]
    assert "".join(text for text, _ in results) == shown
    assert results[-1][1]


def test_text_that_begins_no_stop_string_passes_at_once() -> None:
    matcher = StopMatcher(["###", "\n\nUser:"])
    assert matcher.push("a\n") == ("a", False)
    assert matcher.push("\n") == ("", False)
    assert matcher.push("Us#") == ("\n\nUs", False)
    assert matcher.flush() == "#"


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopMatcher([])
    assert matcher.push("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_long_texts_of_near_misses_take_linear_time() -> None:
    matcher = StopMatcher(["a" * 2000 + "b"])
    started = time.process_time()
    shown = sum(len(matcher.push("aaaa")[0]) for _ in range(50_000))
    assert shown == 200_000 - 2000
    assert time.process_time() - started < 10
