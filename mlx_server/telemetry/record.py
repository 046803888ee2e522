"""What is kept of each request for operators: figures, never text."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

KEPT_REQUESTS = 500


@dataclass(slots=True, eq=False)
class RequestRecord:
    """Seconds are monotonic durations, except for `at`, which is since the epoch. A request of
    several prompts adds up their tokens and states the longest of their times.
    """

    id: str = ""
    at: float = field(default_factory=time.time)
    protocol: str = ""
    path: str = ""
    client: str = ""
    """The key's name, or the client's address."""
    status: int = 0
    """0 while it runs, or if the client left before the answer began."""
    seconds: float | None = None
    """None while it runs."""
    operation: str | None = None
    """`chat`, `text_completion` or `embeddings`; None if no model was asked."""
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    load_seconds: float | None = None
    render_seconds: float | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    first_token_seconds: float | None = None
    """From the request's arrival."""
    finish: list[str] = field(default_factory=list)
    """Per choice: `stop`, `length`, `tool_calls`, `abort` or `error`."""
    engine_ends: int = 0
    """Engines that ended while they worked on it."""
    error: str | None = None
    """The error's code, or its type."""


class RecentRequests:
    """Those in work and the last that ended, of requests that asked a model or were refused."""

    def __init__(self) -> None:
        self._running: dict[int, RequestRecord] = {}
        self._ended: deque[RequestRecord] = deque(maxlen=KEPT_REQUESTS)

    def begin(self, record: RequestRecord) -> None:
        self._running[id(record)] = record

    def end(self, record: RequestRecord, *, kept: bool) -> None:
        self._running.pop(id(record), None)
        if kept or record.operation is not None:
            self._ended.append(record)

    def running(self) -> list[RequestRecord]:
        """Newest first."""
        return [one for one in reversed(self._running.values()) if one.operation is not None]

    def ended(self) -> Iterator[RequestRecord]:
        """Newest first."""
        return reversed(self._ended)
