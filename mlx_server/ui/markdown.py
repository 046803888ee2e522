"""Markdown of models as HTML: whatever they write of HTML is shown as text."""

import html
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from mlx_server.ui.formulas import mathml

LONGEST_CODE = 50_000
"""Characters that are still coloured."""
LIGHT, DARK = "default", "github-dark"
PLAIN = HtmlFormatter[str](nowrap=True)


class Markdown:
    """Renders a text that grows. Blocks that are complete are rendered once."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        """HTML, a piece for each block at the top level."""
        self._known: dict[str, Any] = {}
        """Targets of links, defined in complete blocks."""
        self._done = 0
        """Blocks that nothing can change any more; and where in the text the next begins."""
        self._start = 0

    def update(self, text: str) -> None:
        """`text` is the whole, which begins as the last one did."""
        tail = text[self._start :]
        env = self._env()
        groups = _groups(PARSER.parse(tail, env))
        del self.blocks[self._done :]
        self.blocks += [RENDERER.render(group, PARSER.options, env) for group in groups]
        if len(groups) > 1 and groups[-1][0].map:
            lines = tail.split("\n")[: groups[-1][0].map[0]]
            self._complete("\n".join([*lines, ""]))

    def _env(self) -> dict[str, Any]:
        return {"references": dict(self._known)}

    def _complete(self, blocks: str) -> None:
        env = self._env()
        PARSER.parse(blocks, env)
        self._known = env["references"]
        self._start += len(blocks)
        self._done = len(self.blocks) - 1


def to_html(text: str) -> str:
    markdown = Markdown()
    markdown.update(text)
    return "".join(markdown.blocks)


def highlighting() -> str:
    """The style sheet of coloured code."""
    light = HtmlFormatter[str](style=LIGHT).get_style_defs(".body--light .code")
    dark = HtmlFormatter[str](style=DARK).get_style_defs(".body--dark .code")
    return f"{light}\n{dark}"


def code_block(code: str, language: str = "") -> str:
    label = html.escape(language or "text")
    return (
        f'<div class="code"><div class="code-head"><span>{label}</span>'
        '<button type="button" class="copy" aria-label="Copy this code">Copy</button></div>'
        f'<pre tabindex="0"><code>{_coloured(code, language)}</code></pre></div>\n'
    )


def _coloured(code: str, language: str) -> str:
    if not language or len(code) > LONGEST_CODE:
        return html.escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return html.escape(code)
    return str(highlight(code, lexer, PLAIN))


def _groups(tokens: Sequence[Token]) -> list[list[Token]]:
    """The tokens of each block at the top level."""
    groups: list[list[Token]] = []
    open_ = False
    for token in tokens:
        if not open_:
            groups.append([])
        groups[-1].append(token)
        open_ = not (token.level == 0 and token.nesting <= 0)
    return groups


class Renderer(RendererHTML):
    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        words = tokens[idx].info.split(maxsplit=1)
        return code_block(tokens[idx].content, words[0] if words else "")

    def code_block(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return code_block(tokens[idx].content)

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """As a link: drawing one asks somebody for it."""
        address = html.escape(str(tokens[idx].attrs["src"]))
        label = html.escape(tokens[idx].content) or address
        return f'<a href="{address}">{label}</a>'

    def table_open(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return '<div class="scroll" tabindex="0"><table>'

    def table_close(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return "</table></div>"

    def math_inline(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return mathml(tokens[idx].content, "inline")

    def math_block(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return f'<div class="scroll" tabindex="0">{mathml(tokens[idx].content, "block")}</div>'

    def math_inline_double(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return f'<span class="scroll">{mathml(tokens[idx].content, "block")}</span>'

    math_block_eqno = math_block


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"])
    dollarmath_plugin(
        parser, allow_space=False, allow_digits=False, allow_labels=False, double_inline=True
    )
    texmath_plugin(parser, delimiters="brackets")
    return parser


PARSER = _parser()
RENDERER = Renderer()
