"""The versions of constraints.txt can be installed wherever the project runs."""

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parent.parent.parent / "scripts" / "check_pins.py"), run_name="check_pins"
)


@pytest.mark.soak
@pytest.mark.parametrize("python", SCRIPT["PYTHONS"])
@pytest.mark.parametrize("platform", SCRIPT["PLATFORMS"], ids=lambda platform: platform.name)
def test_every_pin_has_a_wheel_and_is_what_all_others_accept(platform: Any, python: str) -> None:
    assert SCRIPT["problems"](platform, python) == []


def test_what_is_not_pinned_and_what_another_does_not_accept_are_named() -> None:
    unmet, requirement = SCRIPT["unmet"], SCRIPT["Requirement"]
    on_a_mac = SCRIPT["MAC"].environment("3.12")
    found = {
        "one": {"version": "1.0", "requires_dist": ["other>=2", "old<1; extra == 'more'"]},
        "old": {"version": "1.5"},
    }
    not_pinned = "other>=2 is required and other is not pinned"
    assert list(unmet([requirement("one")], found, on_a_mac)) == [not_pinned]
    assert set(unmet([requirement("one[more]>1")], found, on_a_mac)) == {
        "one[more]>1 is required and 1.0 is pinned",
        'old<1; extra == "more" is required and 1.5 is pinned',
        not_pinned,
    }
    assert not list(unmet([requirement("none; sys_platform == 'linux'")], found, on_a_mac))
