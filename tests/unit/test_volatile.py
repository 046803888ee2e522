"""What programs change with every request is taken out of the way; all else stays as it is."""

import time
from typing import Any

import pytest

from mlx_server.models.text.conversations.volatile import settled
from mlx_server.schemas.internal import ChatPrompt

USER: dict[str, Any] = {"role": "user", "content": "Hello"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}
RESULT: dict[str, Any] = {"role": "tool", "content": "42", "tool_call_id": "a"}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def of(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return settled(ChatPrompt(list(messages))).messages


BILLING = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
BUDGET = "<total_tokens>14961419 tokens left</total_tokens>"


def test_a_billing_header_at_the_head_is_left_out() -> None:
    said = "You are a program.\n\nWork."
    assert of(system(f"{BILLING}\n{said}"), USER) == [system(said), USER]
    assert of(system(BILLING), system(said), USER) == [system(said), USER]


def test_what_is_left_of_a_budget_is_left_out_wherever_the_system_says_it() -> None:
    assert of(system("Work."), USER, RESULT, system(BUDGET), ANSWER) == [
        system("Work."),
        USER,
        RESULT,
        ANSWER,
    ]
    assert of(system(f"Work.\n{BUDGET}\nWell."), USER) == [system("Work.\nWell."), USER]


@pytest.mark.parametrize(
    "line",
    [
        "The current date is 2026-11-26 13:17:30.",
        "Current date and time: Monday, March 9, 2026 at 06:00:31 PM PDT",
        "Current time: 2026-07-09 08:15:42 EDT (Thursday)",
        "- **Current Time**: 1:17 PM",
        "current_datetime_utc: 2026-11-26T13:17:30Z",
        "<current_datetime>2026-11-26T13:17:30.123Z</current_datetime>",
        "Today is Thursday, 26 November 2026, 13:17",
        "It is now 13:17 in Berlin.",
        "Now: 2026-11-26 13:17",
        "Date: Thu Nov 26 13:17:30 UTC 2026",
    ],
)
def test_the_time_of_the_day_goes_behind_what_stays(line: str) -> None:
    first = system(f"You are a program.\n{line}\nWork.")
    told = f"42\n\n<system>\n{line}\n</system>"
    assert of(first, USER, ANSWER, RESULT) == [
        system("You are a program.\nWork."),
        USER,
        ANSWER,
        RESULT | {"content": told},
    ]
    assert of(system(line), USER) == [USER | {"content": f"Hello\n\n<system>\n{line}\n</system>"}]
    begun = of(first, USER, ANSWER)
    assert begun[1:] == [USER | {"content": f"Hello\n\n<system>\n{line}\n</system>"}, ANSWER]


@pytest.mark.parametrize(
    "text",
    [
        "You are a program.\n\nToday's date: Thu Nov 26 2026\nWork from 9:00 to 17:00.",
        "Current date: 2026-11-26",
        "The current time zone is UTC+01:00.\nTime: UTC-05:00\nDate format: 2026-01-01 12:00",
        "Nothing like x-anthropic-billing-header: is here.\nx-anthropic-billing-header: nor here",
        "Timeouts are 10:1, dates are ISO 8601, and nowhere is 12:345.",
        "Say <total_tokens>5</total_tokens> in words.",
        "Every update at 12:30 is a time of joy.",
    ],
)
def test_all_else_stays_as_it_is(text: str) -> None:
    messages = [system(text), USER, ANSWER, system(text)]
    assert of(*messages) == messages


def test_what_others_than_the_system_say_stays_as_it_is() -> None:
    said = f"{BILLING}\n{BUDGET}\nCurrent time: 12:30"
    messages = [{"role": role, "content": said} for role in ("user", "assistant", "tool")]
    assert of(*messages) == messages
    assert of(system("Current time: 12:30")) == [system("Current time: 12:30")]
    assert of(system(BUDGET)) == [system(BUDGET)]


def test_a_long_system_prompt_takes_no_time() -> None:
    started = time.perf_counter()
    of(system("current " * 100_000 + "now " * 100_000 + "\n" * 100_000 + " " * 500_000), USER)
    assert time.perf_counter() - started < 2
