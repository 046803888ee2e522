"""Charts and requests in a real browser, of a server that has nothing but figures."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.async_api import expect

from tests.browser.conftest import OpenTab


@pytest.fixture(scope="module")
def figures() -> Iterator[str]:
    """The address of the page."""
    command = [sys.executable, "-m", "tests.support.figures"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


async def test_the_charts_show_the_last_hour_and_move(open_tab: OpenTab, figures: str) -> None:
    tab = await open_tab("charts", url=figures)
    await expect(tab.page.locator(".plot canvas")).to_have_count(7)
    # What a screen reader says ends in the latest values.
    tokens = tab.page.locator(".plots .card[aria-label=Tokens] .plot")
    before = await tokens.get_attribute("aria-label")
    assert before is not None
    assert before.startswith("Tokens, tokens/s: in ")
    await expect(tokens).not_to_have_attribute("aria-label", before, timeout=20_000)


async def test_the_latest_requests_are_listed_with_what_each_took(
    open_tab: OpenTab, figures: str
) -> None:
    tab = await open_tab("requests", url=figures)
    rows = tab.page.get_by_role("row")
    await expect(rows).to_have_count(4)
    await expect(rows.nth(1)).to_contain_text("running")
    await expect(rows.nth(2)).to_contain_text("1,234")
    await expect(rows.nth(2)).to_contain_text("200 ms")
    await expect(rows.nth(3)).to_contain_text("500 error")
    await rows.nth(3).click()
    await expect(tab.page.get_by_role("dialog")).to_contain_text("engine_ended")
    await tab.page.get_by_role("button", name="Close").click()
    await tab.page.get_by_label("Find among requests").fill("error")
    await expect(rows).to_have_count(2)
