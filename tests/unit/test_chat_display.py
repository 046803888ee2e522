"""Markdown that streams: finished blocks leave, and nothing is lost or torn."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from mlx_server.cli.chat.display import MarkdownStream, PlainStream, finished_blocks, open_fence

TEXT = """# A title

Some *words* here.

```python
def f():

    return 1
```

- one

- two

The end.
"""


@given(st.lists(st.sampled_from(["a", "\n", "\n\n", "```\n", "~~~~", "- b", "  c", "1. d", "`"])))
def test_no_character_is_lost_and_no_code_is_torn(parts: list[str]) -> None:
    text = "".join(parts)
    done, rest = finished_blocks(text)
    assert done + rest == text
    assert open_fence(done) is None


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("```py\na", "```py"),
        ("```py\na\n```", None),
        ("````\n```\n", "````"),
        ("~~~\n```\n~~~", None),
        ("a ``` b", None),
    ],
)
def test_a_block_of_code_that_is_open_is_known(text: str, opened: str | None) -> None:
    assert open_fence(text) == opened


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_is_left_on_the_screen_is_the_whole_text(size: int) -> None:
    whole = _console()
    whole.print(Markdown(TEXT))
    streamed = _console()
    with MarkdownStream(streamed, show_thinking=False) as stream:
        for start in range(0, len(TEXT), size):
            stream.write(TEXT[start : start + size], None)
    assert _words(streamed) == _words(whole)


@pytest.mark.parametrize("text", ["word " * 500, "- item\n" * 100, "```\n" + "code\n" * 100])
def test_what_is_drawn_anew_is_no_taller_than_the_screen_and_ends_as_the_text_does(
    text: str,
) -> None:
    console = Console(file=io.StringIO(), width=40, height=12)
    stream = MarkdownStream(console, show_thinking=False)
    stream.write(text + "END", None)
    drawn = console.render_lines(stream.drawn(), pad=False)
    assert len(drawn) < console.height
    assert "END" in "".join(segment.text for line in drawn[-2:] for segment in line)


def test_the_wait_for_a_first_word_is_shown() -> None:
    console = _console()
    stream = MarkdownStream(console, show_thinking=False)
    console.print(stream.drawn())
    assert "waiting," in _words(console)


def test_nothing_is_printed_where_nothing_came(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainStream():
        pass
    assert capsys.readouterr().out == ""


def test_thinking_is_folded_to_how_long_it_took() -> None:
    console = _console()
    with MarkdownStream(console, show_thinking=False) as stream:
        stream.think("hmm, what now")
        stream.write("So.", 2.5)
    assert _words(console) == ["thought", "for", "2.5", "s", "So."]


def test_an_answer_that_breaks_off_keeps_what_came() -> None:
    console = _console()

    def interrupted() -> None:
        with MarkdownStream(console, show_thinking=False) as stream:
            stream.write("```\nhalf of", None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _words(console) == ["half", "of"]


def _console() -> Console:
    return Console(file=io.StringIO(), width=60)


def _words(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().split()
