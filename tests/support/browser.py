"""Chromium, and the page as its user handles it."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    async_playwright,
    expect,
)

PATIENCE = 60_000
"""Milliseconds."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=PATIENCE)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The machine's own, or playwright's; skips where there is neither."""
    async with async_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        path = found or shutil.which(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium here: scripts/install_chromium.sh installs it")
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Tab:
    """`troubles` are what a page should never do: errors, and requests to anybody else."""

    page: Page
    troubles: list[str] = field(default_factory=list)

    @classmethod
    async def open(cls, context: BrowserContext, url: str, view: str = "") -> "Tab":
        page = await context.new_page()
        page.set_default_timeout(PATIENCE)
        tab = cls(page)
        page.on("pageerror", lambda error: tab.troubles.append(str(error)))
        page.on("console", lambda said: tab._hear(said.type, said.text))
        page.on("request", lambda request: tab._watch(request.url, url))
        await page.goto(f"{url}/ui/{view}", wait_until="commit")
        return tab

    def _hear(self, kind: str, text: str) -> None:
        # Chromium reports answers such as 401 of its own accord.
        if kind == "error" and "Failed to load resource" not in text:
            self.troubles.append(text)

    def _watch(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.troubles.append(f"asked {asked}")

    @property
    def draft(self) -> Locator:
        return self.page.get_by_role("textbox", name="Your message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator(".message.assistant")

    async def choose_model(self, name: str) -> None:
        await self.page.locator(".bar .model").first.click()
        await self.page.get_by_role("option", name=name).click()

    async def ask(self, text: str) -> Locator:
        """The answer, which may still be coming."""
        known = await self.answers.count()
        await self.draft.fill(text)
        await self.draft.press("Enter")
        answer = self.answers.nth(known)
        await answer.wait_for()
        return answer

    async def ended(self, answer: Locator) -> str:
        """Its whole text."""
        await answer.get_by_label("Retry").wait_for()
        return await answer.locator(".body > .prose").inner_text()

    async def show(self, view: str) -> None:
        await self.page.get_by_role("tab", name=view).click()
