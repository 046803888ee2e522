"""Log lines for machines and for people, and a level for each area."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_server
from mlx_server.events import AREAS, HumanFormatter, JsonFormatter, event, set_levels, setup_logging


def record(
    message: object, level: int = logging.INFO, error: Exception | None = None
) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord("mlx_server.pool", level, "", 0, message, (), info)


@pytest.fixture
def levels() -> Iterator[None]:
    """Whatever a test does to loggers is undone."""
    names = [None, "sse_starlette", *(name for area in AREAS.values() for name in area)]
    before = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_an_event_is_an_object_with_its_fields_as_they_are() -> None:
    told = event("loaded", model='a "b"\n', seconds=1.23456789, bytes=7, ready=True, none=None)
    line = JsonFormatter().format(record(told, logging.WARNING))
    assert "\n" not in line
    read = json.loads(line)
    assert read.pop("time").endswith("Z")
    assert read == {
        "level": "warning",
        "event": "loaded",
        "model": 'a "b"\n',
        "seconds": 1.23457,
        "bytes": 7,
        "ready": True,
    }


def test_an_event_for_people_is_one_line_however_odd_its_fields() -> None:
    line = HumanFormatter(colour=False).format(record(event("loaded", model="a\n\x1b[2Jb", n=3)))
    assert line.endswith('INFO    loaded model="a\\n\\x1b[2Jb" n=3')
    assert "\x1b" not in line
    assert "\x1b[36m" in HumanFormatter(colour=True).format(record(event("loaded")))


def test_other_libraries_sentences_and_errors_are_in_one_object_too() -> None:
    line = json.loads(JsonFormatter().format(record("it\nbroke", error=ValueError("so"))))
    assert (line["event"], line["message"]) == ("log", "it\nbroke")
    assert "ValueError: so" in line["exception"]


def test_what_is_no_terminal_gets_json_and_either_can_be_asked_for(
    levels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    for terminal, format in ((False, "auto"), (True, "auto"), (True, "json"), (False, "human")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)  # noqa: B023
        setup_logging("info", format)  # type: ignore[arg-type]
        kinds.append(type(logging.getLogger().handlers[0].formatter))
    assert kinds == [JsonFormatter, HumanFormatter, JsonFormatter, HumanFormatter]


def test_an_area_has_a_level_of_its_own_until_it_is_taken_back(levels: None) -> None:
    pool, text = logging.getLogger("mlx_server.pool"), logging.getLogger("mlx_server.text")
    set_levels("warning", {"pool": "debug"})
    assert pool.isEnabledFor(logging.DEBUG)
    assert not text.isEnabledFor(logging.INFO)
    set_levels("info", {})
    assert not pool.isEnabledFor(logging.DEBUG)
    assert text.isEnabledFor(logging.INFO)


def test_every_logger_of_ours_belongs_to_an_area() -> None:
    named = re.compile(r"getLogger\((?:\"(mlx_server\S*)\"|__name__)\)")
    root = Path(mlx_server.__file__).parent
    names = set()
    for file in root.rglob("*.py"):
        module = ".".join(file.relative_to(root.parent).with_suffix("").parts)
        names |= {match[1] or module for match in named.finditer(file.read_text(encoding="utf-8"))}
    assert len(names) > 10
    known = tuple(name for area in AREAS.values() for name in area)
    assert not {name for name in names if not name.startswith(known)}


def test_no_level_lets_a_completions_text_into_the_log(levels: None) -> None:
    set_levels("debug", dict.fromkeys(AREAS, "debug"))
    assert not logging.getLogger("sse_starlette").isEnabledFor(logging.DEBUG)
