"""A message as it is shown, also while it grows."""

import json

from nicegui import ui

from mlx_server.ui import words
from mlx_server.ui.chat.conversation import Call, Message
from mlx_server.ui.markdown import Markdown, code_block

FINISHES = {
    "length": "cut off at the token limit",
    "stopped": "stopped",
    "content_filter": "filtered",
}


class Prose:
    """Markdown that grows: the browser gets what has changed."""

    def __init__(self) -> None:
        self._box = ui.element("div").classes("prose")
        self._blocks: list[ui.html] = []
        self._markdown = Markdown()

    def update(self, text: str) -> None:
        self._markdown.update(text)
        blocks = self._markdown.blocks
        for shown, content in zip(self._blocks, blocks, strict=False):
            shown.set_content(content)
        with self._box:
            self._blocks += [ui.html(content) for content in blocks[len(self._blocks) :]]
        while len(self._blocks) > len(blocks):
            self._blocks.pop().delete()


class AnswerView:
    """Shows `message`; `update` after each change."""

    def __init__(self, message: Message, waiting_for: str) -> None:
        self._message = message
        self._thoughts: Prose | None = None
        self._thinking: ui.expansion | None = None
        self._thinking_box = ui.element("div")
        self._waiting = ui.row().classes("waiting items-center").props('role="status"')
        with self._waiting:
            ui.spinner(size="1.2em")
            ui.label(waiting_for)
        self._prose = Prose()
        self._calls_box = ui.element("div")
        self._calls_shown = ""
        self._error = ui.label().classes("error").props('role="alert"')
        self._figures = ui.label().classes("figures")
        self.update()

    def update(self, *, ended: bool = False) -> None:
        message = self._message
        begun = bool(message.content or message.reasoning or message.calls)
        self._waiting.set_visibility(not (begun or ended))
        if message.reasoning:
            self._show_thinking(message.reasoning)
        if message.content:
            self._prose.update(message.content)
        if message.calls:
            self._show_calls()
        self._error.set_text(message.error)
        self._error.set_visibility(bool(message.error))
        self._figures.set_text(figures(message))

    def _show_thinking(self, text: str) -> None:
        if self._thinking is None or self._thoughts is None:
            with self._thinking_box:
                self._thinking = ui.expansion(icon="psychology").classes("thinking")
            with self._thinking:
                self._thoughts = Prose()
        self._thoughts.update(text)
        took = self._message.thought_seconds
        over = self._message.content or self._message.calls or self._message.finish
        self._thinking.set_text(f"{'Thought for' if over else 'Thinking…'} {words.seconds(took)}")

    def _show_calls(self) -> None:
        shown = json.dumps([[call.name, call.arguments] for call in self._message.calls])
        if shown == self._calls_shown:
            return
        self._calls_shown = shown
        self._calls_box.clear()
        with self._calls_box:
            for call in self._message.calls:
                _show_call(call)


def _show_call(call: Call) -> None:
    with ui.expansion(f"Calls {call.name}", icon="build", value=True).classes("call"):
        ui.html(code_block(_indented(call.arguments), "json"))
        if call.result is not None:
            ui.label("Result").classes("figures")
            ui.html(code_block(call.result))


def _indented(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), indent=2, ensure_ascii=False)
    except ValueError:
        return arguments  # not all of it is there yet


def figures(message: Message) -> str:
    """What an answer took, in one line."""
    parts = []
    if message.tokens_per_second is not None:
        parts.append(f"{message.tokens_per_second:.1f} tokens/s")
    if message.first_seconds is not None:
        parts.append(f"first token after {words.seconds(message.first_seconds)}")
    if message.tokens:
        parts.append(f"{words.number(message.tokens)} tokens")
    if message.prompt_tokens:
        cached = f", {words.number(message.cached_tokens)} cached" if message.cached_tokens else ""
        parts.append(f"{words.number(message.prompt_tokens)} in the prompt{cached}")
    if finish := FINISHES.get(message.finish):
        parts.append(finish)
    return " · ".join(parts)
