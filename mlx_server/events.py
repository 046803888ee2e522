"""Log events: one line each, a name and fields. No secrets, no prompt text."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

LogFormat = Literal["auto", "human", "json"]
Level = Literal["debug", "info", "warning", "error"]

Area = Literal["requests", "pool", "engine", "text", "models", "server"]
AREAS: dict[Area, tuple[str, ...]] = {
    "requests": ("mlx_server.api",),
    "pool": ("mlx_server.pool", "mlx_server.supervisor", "mlx_server.hosts"),
    "engine": ("mlx_server.engine",),
    "text": ("mlx_server.text", "mlx_server.services"),
    "models": ("mlx_server.store", "mlx_server.pulls"),
    "server": ("mlx_server.server", "mlx_server.keys", "mlx_server.telemetry", "mlx_server.page"),
}
"""Loggers by what they tell of."""
COLOURS = {"DEBUG": "2", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}
RESET = "\x1b[0m"
LOG_FILE_BYTES = 10_000_000
LOG_FILES = 5
"""Older ones that are kept."""

PAGE_AGENT = "mlx-server-page"
"""How the web page calls itself; what it reads is not logged at every look."""


class Event:
    """Its text is `event=name key=value …`, without None values."""

    def __init__(self, name: str, fields: Mapping[str, object]) -> None:
        self.name = name
        self.fields = {key: value for key, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return f"event={self.name}{''.join(f' {pair}' for pair in _pairs(self.fields))}"


def event(name: str, **fields: object) -> Event:
    return Event(name, fields)


def _pairs(fields: Mapping[str, object]) -> Iterable[str]:
    return (f"{key}={_value(value)}" for key, value in fields.items())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and all(char.isprintable() and char not in ' "=' for char in text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def _event_of(record: logging.LogRecord) -> Event:
    """Other libraries' sentences are events too."""
    if isinstance(record.msg, Event):
        return record.msg
    return Event("log", {"logger": record.name, "message": record.getMessage()})


class JsonFormatter(logging.Formatter):
    """An object per line, with `time`, `level` and `event`."""

    def format(self, record: logging.LogRecord) -> str:
        told = _event_of(record)
        line: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "event": told.name,
        }
        line |= {key: _plain(value) for key, value in told.fields.items()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """A line per event, for a terminal."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        told = _event_of(record)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level, name = f"{record.levelname:<7}", told.name
        if self._colour:
            level = f"\x1b[{COLOURS.get(record.levelname, '0')}m{level}{RESET}"
            name = f"\x1b[1m{name}{RESET}"
        line = " ".join([clock, level, name, *_pairs(told.fields)])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def setup_logging(
    level: Level,
    format: LogFormat = "auto",
    areas: Mapping[Area, Level] | None = None,
    file: Path | None = None,
) -> None:
    """`areas`: those of `AREAS` that have a level of their own. `file`, which rotates, takes
    standard error's place. Raises OSError if it cannot be written.
    """
    handler = _to_file(file) if file else logging.StreamHandler()
    terminal = file is None and sys.stderr.isatty()
    human = terminal if format == "auto" else format == "human"
    colour = terminal and not os.environ.get("NO_COLOR")
    handler.setFormatter(HumanFormatter(colour=colour) if human else JsonFormatter())
    logging.basicConfig(handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Our request event holds more.
    logging.getLogger("uvicorn.access").propagate = False
    set_levels(level, areas or {})


def _to_file(file: Path) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True)
    return RotatingFileHandler(file, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES)


def set_levels(level: Level, areas: Mapping[Area, Level]) -> None:
    logging.getLogger().setLevel(level.upper())
    for names in AREAS.values():
        for name in names:
            logging.getLogger(name).setLevel(logging.NOTSET)
    # At debug level it logs every chunk: the completion's text.
    logging.getLogger("sse_starlette").setLevel(logging.INFO)
    # Of starting and stopping it tells what our own events tell.
    told = logging.NOTSET if level == "debug" else logging.WARNING
    logging.getLogger("uvicorn.error").setLevel(told)
    # They log download URLs, which may be signed.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for area, own in areas.items():
        for name in AREAS[area]:
            logging.getLogger(name).setLevel(own.upper())


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if isinstance(value, bool | int | str) else str(value)
