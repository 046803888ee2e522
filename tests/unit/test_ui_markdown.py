"""What models write, as the page shows it."""

import pytest

from mlx_server.ui.formulas import LONGEST, mathml
from mlx_server.ui.markdown import Markdown, to_html

TEXT = r"""# Title <b>x</b>
Some *words* with $a_1 < b$, costing $5 and $6.

```python
def f(): return "<b>"
```
- one
  - two

| a | b |
|---|---|
| 1 | 2 |

\[ y = \alpha \]

[ref]: http://example.org
See [ref].
"""


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a <img src=x onerror=alert(1)> b",
        "```html\n<script>alert(1)</script>\n```",
        "`<script>`",
        r"$\text{<script>alert(1)</script>}$",
        "```<script>\ncode\n```",
        "| <script> |\n|---|\n| <img src=x> |",
    ],
)
def test_html_is_text(text: str) -> None:
    html = to_html(text)
    assert "&lt;" in html
    assert "<script" not in html
    assert "<img" not in html


@pytest.mark.parametrize(
    "text",
    ["[a](javascript:alert(1))", "![a](javascript:alert(1))", r"$\href{javascript:alert(1)}{x}$"],
)
def test_no_link_runs_a_script(text: str) -> None:
    assert "href" not in to_html(text)


def test_an_image_is_a_link() -> None:
    html = to_html("![a cat](http://example.org/cat.png)")
    assert html == '<p><a href="http://example.org/cat.png">a cat</a></p>\n'


def test_a_text_that_grows_ends_as_the_whole_does() -> None:
    growing = Markdown()
    for end in range(len(TEXT) + 1):
        growing.update(TEXT[:end])
    assert "".join(growing.blocks) == to_html(TEXT)
    assert "<td>2</td>" in "".join(growing.blocks)


def test_complete_blocks_are_not_rendered_again() -> None:
    growing = Markdown()
    growing.update("one\n\ntwo\n\nthree")
    kept = growing.blocks[:2]
    growing.update("one\n\ntwo\n\nthree and four")
    assert all(new is old for new, old in zip(growing.blocks, kept, strict=False))
    assert growing.blocks[2] == "<p>three and four</p>\n"


@pytest.mark.parametrize(
    "tex",
    [r"\left( x", "x^2^3", r"\begin{matrix} 1", "", "{" * 3000, "x" * LONGEST * 2],
)
def test_bad_tex_is_shown_as_it_is(tex: str) -> None:
    assert mathml(tex, "inline") == f"<code>{tex}</code>"


def test_money_is_no_formula() -> None:
    assert "<math" not in to_html("It costs $5 here and $6 there.")
