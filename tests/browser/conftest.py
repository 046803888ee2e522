"""A browser, a server whose models say what shows, and tabs of its page."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, BrowserContext

from tests.support.browser import Tab, chromium
from tests.support.server import Server, serving
from tests.support.tiny import FAMILIES, build_scripted_model

HOSTILE = (
    "Look: <script>document.title='taken'</script> <img src=x onerror=\"document.title='hit'\"> "
    "[press](javascript:alert(1)) ![spy](http://192.0.2.1/s.png) done"
)
RICH = """\
# Title

Some **bold** and `mono`, then:

```python
def f(x):
    return x + 1
```

- one
- two

| a | b |
|---|---|
| 1 | 2 |

So $E = mc^2$ holds.
"""
THOUGHT = "Hm, what is it"
ANSWER = "Paris, of course"
CALL = (
    'So:\n<tool_call>\n{"name": "forecast", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
)
MARKS = ["<think>", "</think>"]

OpenTab = Callable[..., Awaitable[Tab]]


def build_models(folder: Path) -> None:
    """Models that say each of these, and `endless`, which goes on and on."""
    # A prompt must not end in a token of the script.
    llama, qwen = (FAMILIES[name].template + "{{- 'Z' }}" for name in ("llama", "qwen"))
    # Where others have their end of an answer, it has a word more. Random models end by chance.
    build_scripted_model(
        folder / "endless", "So it goes ", stop="X", context=131_072, template=llama
    )
    build_scripted_model(folder / "hostile", HOSTILE, template=llama)
    build_scripted_model(folder / "rich", RICH, template=llama)
    build_scripted_model(
        folder / "thinker",
        f"<think>{THOUGHT}.</think>{ANSWER}",
        family="qwen",
        extra_tokens=[mark for mark in MARKS if mark not in FAMILIES["qwen"].plain_tokens],
        template="{#- <think></think> -#}" + qwen,
    )
    build_scripted_model(folder / "caller", CALL, family="qwen", template=qwen)


@pytest.fixture(scope="session")
def page_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pages")
    build_models(home / "models")
    return home


@pytest.fixture(scope="session")
def page_server(page_home: Path) -> Iterator[Server]:
    """A server that all tests here share: leave it as you found it."""
    with serving(page_home, "--model", "rich") as server:
        yield server


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """A browser without a past."""
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    yield context
    await context.close()


@pytest.fixture
async def open_tab(context: BrowserContext, page_server: Server) -> AsyncIterator[OpenTab]:
    """Opens tabs, which in the end must have had no troubles."""
    tabs: list[Tab] = []

    async def open_one(view: str = "", url: str = page_server.url) -> Tab:
        tabs.append(await Tab.open(context, url, view))
        return tabs[-1]

    yield open_one
    assert [trouble for tab in tabs for trouble in tab.troubles] == []
