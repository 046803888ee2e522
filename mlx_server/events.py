"""Log events: one line each, a name and fields. No secrets, no prompt text."""

import logging
import time

PAGE_AGENT = "mlx-server-page"
"""How the web page calls itself; what it reads is not logged at every look."""


def event(name: str, **fields: object) -> str:
    """`event=name key=value …`, without None values."""
    given = {"event": name} | {key: value for key, value in fields.items() if value is not None}
    return " ".join(f"{key}={_value(value)}" for key, value in given.items())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and all(char.isprintable() and char not in ' "=' for char in text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


class EventFormatter(logging.Formatter):
    """One line per event; other libraries' sentences too."""

    def __init__(self) -> None:
        super().__init__(
            fmt="%(asctime)s.%(msecs)03dZ level=%(levelname)s %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not record.message.startswith("event="):
            record.message = event("log", logger=record.name, message=record.message)
        return super().formatMessage(record)


def setup_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Our request event holds more.
    logging.getLogger("uvicorn.access").propagate = False
    # At debug level it logs every chunk: the completion's text.
    logging.getLogger("sse_starlette").setLevel(logging.INFO)
    # They log download URLs, which may be signed.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
