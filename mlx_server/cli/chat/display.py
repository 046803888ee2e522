"""Answers on a terminal: Markdown that grows as it streams."""

import re
import time
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
SPARE_LINES = 3
THOUGHTS = 3
"""Lines of thinking that are shown."""
REFRESHES = 10
"""Per second."""


class MarkdownStream:
    """Blocks that are finished are printed once and scroll away; the last one is drawn anew as it
    grows, no taller than the screen.
    """

    def __init__(self, console: Console, show_thinking: bool) -> None:
        self._console = console
        self._show_thinking = show_thinking
        self._open = ""
        self._thinking = ""
        self._thought = False
        self._begun = time.monotonic()
        self._waiting = Spinner("dots", style="dim")
        # It takes what is printed for its own, and so do callers.
        self._live = Live(
            console=console, transient=True, refresh_per_second=REFRESHES, get_renderable=self.drawn
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()
        if not self._thought:
            self._end_thinking(None)
        self._print(self._open)

    def think(self, text: str) -> None:
        self._thinking += text

    def write(self, text: str, thought: float | None) -> None:
        """`thought`: for how many seconds the model has thought."""
        if not self._thought:
            self._thought = True
            self._end_thinking(thought)
        self._open += text
        done, self._open = finished_blocks(self._open)
        self._print(done)

    def _end_thinking(self, seconds: float | None) -> None:
        if self._thinking and self._show_thinking:
            self._console.print(Text(self._thinking.strip(), style="dim italic"))
        if self._thinking:
            after = f" for {seconds:.1f} s" if seconds is not None else ""
            self._console.print(Text(f"thought{after}", style="dim"))
        self._thinking = ""

    def _print(self, markdown: str) -> None:
        if markdown.strip():
            self._console.print(Markdown(markdown))

    def drawn(self) -> RenderableType:
        """What is not finished yet."""
        if self._thinking:
            thinking = Text(self._thinking.strip(), style="dim italic", overflow="fold")
            return Group(Text("thinking…", style="dim italic"), LastLines(thinking, THOUGHTS))
        if self._thought:
            return LastLines(Markdown(self._open), self._room)
        seconds = time.monotonic() - self._begun
        self._waiting.update(text=Text(f"waiting, {seconds:.0f} s", style="dim"))
        return self._waiting

    @property
    def _room(self) -> int:
        return max(1, self._console.height - SPARE_LINES)


class LastLines:
    """The end of what is too tall, in lines as the screen has them: long ones are folded."""

    def __init__(self, whole: RenderableType, lines: int) -> None:
        self._whole = whole
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._whole, options.update(height=None), pad=False)
        for line in lines[-self._lines :]:
            yield from line
            yield Segment.line()


def finished_blocks(text: str) -> tuple[str, str]:
    """`text` up to its last empty line outside code and lists, and the rest."""
    end = 0
    for match in re.finditer(r"\n[ \t]*\n(?=\S)", text):
        before, after = text[: match.end()], text[match.end() :]
        in_list = re.match(r"([-*+]|\d+[.)])(\s|$)", after) or len(after) < 3
        if not in_list and open_fence(before) is None:
            end = match.end()
    return text[:end], text[end:]


def open_fence(text: str) -> str | None:
    """The line that opened a block of code which `text` does not close."""
    opened: str | None = None
    fence = ""
    for line in text.splitlines():
        if not (match := FENCE.match(line)):
            continue
        if opened is None:
            opened, fence = line, match[1]
        elif match[1].startswith(fence) and line.strip() == match[1]:
            opened = None
    return opened


class PlainStream:
    """For pipes and files: the text as it is; thinking is left out."""

    def __init__(self) -> None:
        self._written = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._written:
            print(flush=True)

    def think(self, text: str) -> None: ...

    def write(self, text: str, thought: float | None) -> None:
        self._written = True
        print(text, end="", flush=True)


Stream = MarkdownStream | PlainStream
