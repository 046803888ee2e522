"""Models, keys and the rest of the page in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.browser.conftest import OpenTab
from tests.support.server import Server, serving

KEY = "secret"
ADMIN = "more-secret"


@pytest.fixture(scope="module")
def locked(page_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for keys."""
    home = tmp_path_factory.mktemp("locked")
    shutil.copytree(page_home / "models" / "rich", home / "models" / "rich")
    with serving(home, "--api-key", KEY, ready=False, admin_keys=[ADMIN]) as server:
        yield server


async def test_a_model_is_loaded_pinned_and_unloaded(
    open_tab: OpenTab, page_server: Server
) -> None:
    async with page_server.client() as client:
        await client.post("/admin/models/hostile/unload")
    tab = await open_tab("models")
    card = tab.page.get_by_role("region", name="hostile")
    await card.get_by_role("button", name="Load", exact=True).click()
    await expect(card.locator(".state")).to_have_text("ready")
    await expect(card).to_contain_text("in use")
    await card.get_by_label("Pin: never make room for others").click()
    await card.get_by_label("Let it make room for others").wait_for()
    assert (await page_server.models())["hostile"]["pinned"]
    await card.get_by_label("Let it make room for others").click()
    await card.get_by_role("button", name="Unload").click()
    await expect(card.locator(".state")).to_have_text("not loaded")
    await expect(tab.page.locator(".budget")).to_contain_text("reserved for models")


async def test_what_is_told_of_a_model_changes_around_the_hand_that_is_on_it(
    open_tab: OpenTab, page_server: Server
) -> None:
    tab = await open_tab("models")
    card = tab.page.get_by_role("region", name="rich")
    unload = card.get_by_role("button", name="Unload")
    await unload.focus()
    async with page_server.client() as client:
        for deed, told in (("pin", "Let it make room for others"), ("unpin", "Pin: never")):
            await client.post(f"/admin/models/rich/{deed}")
            await card.get_by_label(told).wait_for()
            await expect(unload).to_be_focused()


async def test_a_fetch_that_fails_says_why(open_tab: OpenTab) -> None:
    tab = await open_tab("models")
    await tab.page.get_by_label("Fetch a model").fill("no such name")
    await tab.page.get_by_role("button", name="Fetch").click()
    await expect(tab.page.get_by_role("alert").filter(has_text="no such name")).to_be_visible()


async def test_a_wrong_key_is_told_and_the_right_one_opens_the_page(
    open_tab: OpenTab, locked: Server
) -> None:
    tab = await open_tab(url=locked.url)
    page = tab.page
    await expect(page.get_by_text("No API key was given")).to_be_visible()
    await page.get_by_role("button", name="Enter a key").click()
    await page.get_by_label("Key", exact=True).fill("wrong")
    await page.get_by_role("button", name="Use it").click()
    await expect(page.get_by_text("The API key is not known")).to_be_visible()
    await expect(tab.draft).to_have_count(0)
    await page.get_by_label("API key").click()
    await page.get_by_label("Key", exact=True).fill(KEY)
    await page.keyboard.press("Enter")
    await tab.ended(await tab.ask("Hello"))
    await tab.show("Models")
    await expect(page.get_by_text("not one for administrators")).to_be_visible()
    await page.get_by_role("button", name="Enter a key").click()
    await page.get_by_label("Key", exact=True).fill(ADMIN)
    await page.get_by_role("checkbox").click()
    await page.get_by_role("button", name="Use it").click()
    await page.get_by_role("region", name="rich").wait_for()
    again = await open_tab("models", url=locked.url)
    await again.page.get_by_role("region", name="rich").wait_for()
    await again.show("Connect")
    await expect(again.page.get_by_text("YOUR_KEY").first).to_be_visible()
    assert ADMIN not in await again.page.content()


@pytest.mark.soak
async def test_each_view_has_its_address_and_dark_mode_is_kept(open_tab: OpenTab) -> None:
    tab = await open_tab("connect")
    await expect(tab.page.get_by_role("tab", name="Connect")).to_have_attribute(
        "aria-selected", "true"
    )
    await expect(tab.page.get_by_text("This server answers at")).to_be_visible()
    await tab.show("Models")
    await tab.page.wait_for_url("**/ui/models")
    await tab.page.get_by_label("Light or dark").click()
    await expect(tab.page.locator("body.body--dark")).to_have_count(1)
    again = await open_tab()
    await expect(again.page.locator("body.body--dark")).to_have_count(1)


async def test_on_a_phone_nothing_is_wider_than_the_screen(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.page.set_viewport_size({"width": 360, "height": 740})
    await tab.draft.wait_for()
    for view in ("Chat", "Models", "Connect"):
        await tab.show(view)
        await expect(tab.page.locator(".nicegui-tab-panel > *").first).to_be_visible()
        width = await tab.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, view


async def test_every_control_has_a_name_that_is_read_aloud(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.draft.wait_for()
    for view in ("Chat", "Models", "Connect"):
        await tab.show(view)
        await tab.page.wait_for_load_state()
        nameless = await tab.page.evaluate(
            """[...document.querySelectorAll('button, input, textarea, [role=tab]')]
            .filter((one) => one.checkVisibility() && one.type !== 'hidden')
            .filter((one) => !(one.ariaLabel || one.textContent.trim()
                || [...(one.labels || [])].some((label) => label.textContent.trim())
                || one.closest('label')?.textContent.trim()))
            .map((one) => one.outerHTML)"""
        )
        assert nameless == [], view
