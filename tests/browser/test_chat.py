"""The chat in a real browser."""

import json

import pytest
from playwright.async_api import expect

from tests.browser.conftest import ANSWER, HOSTILE, THOUGHT, OpenTab
from tests.support.server import Server, until

QUOTED = 'Remember "this" title=none'


async def test_an_answer_is_shown_as_markdown_with_its_figures(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("rich")
    answer = await tab.ask("Hello")
    await tab.ended(answer)
    prose = answer.locator(".body > .prose")
    await expect(prose.locator("h1")).to_have_text("Title")
    await expect(prose.locator("strong")).to_have_text("bold")
    await expect(prose.locator("li")).to_have_count(2)
    await expect(prose.locator("td")).to_have_text(["1", "2"])
    await expect(prose.locator("math msup")).to_have_count(1)
    await expect(prose.locator("pre .k").first).to_have_text("def")
    figures = await answer.locator(".figures").first.inner_text()
    assert "tokens/s" in figures
    assert "first token after" in figures
    await tab.page.evaluate(
        "mlx.copied = null; navigator.clipboard.writeText = async t => { mlx.copied = t }"
    )
    await prose.get_by_role("button", name="Copy this code").click()
    assert await tab.page.evaluate("mlx.copied") == "def f(x):\n    return x + 1\n"


async def test_html_and_script_in_an_answer_are_shown_as_text(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("hostile")
    text = await tab.ended(await tab.ask("<b>Hello</b> <script>document.title='mine'</script>"))
    shown = HOSTILE.replace("![spy](http://192.0.2.1/s.png)", "spy")
    assert text.strip() == shown
    assert "<b>Hello</b>" in await tab.page.locator(".said").inner_text()
    assert await tab.page.locator(".messages :is(script, img, iframe)").count() == 0
    assert await tab.page.title() == "mlx-server"


async def test_the_page_may_call_nobody_else(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.draft.wait_for()
    for attempt in (
        "fetch('http://192.0.2.1/')",
        "new Promise((yes, no) => { const i = new Image(); i.onload = yes; i.onerror = no; "
        "i.src = 'http://192.0.2.1/s.png' })",
    ):
        refused = await tab.page.evaluate(f"{attempt}.then(() => false, () => true)")
        assert refused
    complaints = [trouble for trouble in tab.troubles if "Content Security Policy" in trouble]
    assert len(complaints) >= 2
    tab.troubles.clear()


async def test_thinking_is_folded_with_its_duration(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("thinker")
    answer = await tab.ask("Capital of France?")
    assert await tab.ended(answer) == ANSWER
    thinking = answer.locator(".thinking")
    await expect(thinking.get_by_text("Thought for")).to_be_visible()
    await expect(thinking.get_by_text(THOUGHT)).to_be_hidden()
    await thinking.get_by_text("Thought for").click()
    await expect(thinking.get_by_text(THOUGHT)).to_be_visible()


@pytest.mark.soak
async def test_a_tool_call_is_shown_and_takes_a_result(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("caller")
    await tab.page.get_by_label("Settings").click()
    tool = {"type": "function", "function": {"name": "forecast", "parameters": {"type": "object"}}}
    await tab.page.get_by_label("Tools (OpenAI's JSON)").fill(json.dumps([tool]))
    await tab.page.keyboard.press("Escape")
    answer = await tab.ask("Weather?")
    await expect(answer.locator(".call")).to_contain_text("Calls forecast")
    await expect(answer.locator(".call code")).to_contain_text('"city": "Rome"')
    await answer.get_by_label("Result of forecast").fill("sunny")
    await answer.get_by_role("button", name="Send results").click()
    await expect(tab.answers).to_have_count(2)
    await expect(tab.answers.first.locator(".call")).to_contain_text("sunny")


async def test_stop_ends_an_answer_and_its_generation(
    open_tab: OpenTab, page_server: Server
) -> None:
    tab = await open_tab()
    await tab.choose_model("endless")
    answer = await tab.ask("Go on")
    await expect(answer.locator(".body > .prose")).not_to_be_empty()
    await tab.page.get_by_label("Stop").click()
    await tab.ended(answer)
    await expect(answer.locator(".figures").first).to_contain_text("stopped")
    await page_server.idle("endless", seconds=10)


@pytest.mark.soak
async def test_a_tab_that_closes_ends_its_generation(
    open_tab: OpenTab, page_server: Server
) -> None:
    tab = await open_tab()
    await tab.choose_model("endless")
    answer = await tab.ask("Go on")
    await expect(answer.locator(".body > .prose")).not_to_be_empty()
    await tab.page.close()

    async def idle() -> bool:
        return bool((await page_server.models())["endless"]["in_flight"] == 0)

    await until(idle, 60)


async def test_retry_and_edit_branch_the_conversation(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("rich")
    answer = await tab.ask("First words")
    await tab.ended(answer)
    await answer.get_by_label("Retry").click()
    await expect(tab.answers.first.locator(".actions")).to_contain_text("2/2")
    mine = tab.page.locator(".message.user").first
    await mine.get_by_label("Edit").click()
    await mine.get_by_label("Your message, edited").fill("Other words")
    await mine.get_by_role("button", name="Send").click()
    await tab.ended(tab.answers.first)
    await expect(mine.locator(".said")).to_have_text("Other words")
    await mine.get_by_label("Previous version").click()
    await expect(mine.locator(".said")).to_have_text("First words")
    await expect(tab.answers.first.locator(".actions")).to_contain_text("2/2")


async def test_conversations_stay_in_the_browser_and_can_be_exported(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("rich")
    await tab.ended(await tab.ask(QUOTED))
    again = await open_tab()
    await again.page.get_by_role("button", name=QUOTED, exact=True).click()
    await expect(again.answers.first).to_contain_text("Title")
    await again.page.get_by_label("Export").click()
    async with again.page.expect_download() as downloading:
        await again.page.get_by_text("As Markdown").click()
    text = (await (await downloading.value).path()).read_text()
    assert QUOTED in text
    assert "# Title" in text
    await again.page.get_by_label(f"Remove {QUOTED}").click()
    await again.page.get_by_role("button", name="Remove", exact=True).click()
    await expect(again.page.get_by_text("Conversations stay in this browser.")).to_be_visible()


@pytest.mark.soak
async def test_a_json_schema_binds_the_answer(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("endless")
    await tab.page.get_by_label("Settings").click()
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    await tab.page.get_by_label("JSON schema of answers").fill(json.dumps(schema))
    await tab.page.keyboard.press("Escape")
    text = await tab.ended(await tab.ask("Go on"))
    assert json.loads(text)["a"] in (1, 2)


@pytest.mark.soak
async def test_two_models_answer_side_by_side(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.choose_model("rich")
    await tab.page.get_by_label("Compare two models").click()
    await tab.page.get_by_label("Model 2").click()
    await tab.page.get_by_role("option", name="thinker").click()
    await tab.ask("Hello")
    left, right = tab.answers.nth(0), tab.answers.nth(1)
    assert "Title" in await tab.ended(left)
    assert await tab.ended(right) == ANSWER


async def test_the_chat_works_by_keyboard(open_tab: OpenTab) -> None:
    tab = await open_tab()
    await tab.draft.wait_for()
    await expect(tab.draft).to_be_focused()
    await tab.choose_model("rich")
    await tab.draft.focus()
    await tab.page.keyboard.type("Hello")
    await tab.page.keyboard.press("Shift+Enter")
    await tab.page.keyboard.type("there")
    await tab.page.keyboard.press("Enter")
    await tab.ended(tab.answers.first)
    assert await tab.page.locator(".said").inner_text() == "Hello\nthere"
    await tab.page.get_by_role("tab", name="Chat").focus()
    await tab.page.keyboard.press("ArrowRight")
    await tab.page.keyboard.press("Enter")
    await expect(tab.page.get_by_role("tab", name="Models")).to_have_attribute(
        "aria-selected", "true"
    )


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.soak)])
async def test_several_tabs_answer_at_once(open_tab: OpenTab, count: int) -> None:
    tabs = [await open_tab()]
    await tabs[0].choose_model("rich")
    tabs += [await open_tab() for _ in range(1, count)]
    answers = [await tab.ask(f"Tab {number}") for number, tab in enumerate(tabs)]
    for tab, answer in zip(tabs, answers, strict=True):
        assert "Title" in await tab.ended(answer)
