"""The stages of a request, one after the other: how long each took, and a span for each."""

import time
from typing import Literal

from opentelemetry.trace import Span

from mlx_server.telemetry.tracing import fail_span, nanoseconds, start_span

Stage = Literal["load", "render", "queue", "prefill", "decode", "pause", "restart"]
"""Waiting for the model; template and tokenizer, in the text process; waiting for the engine to
begin; from there to a token; from a token to the last; a client that does not read; from an
engine's end until the next one begins.
"""


class Stages:
    def __init__(self, parent: Span) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[Stage, float] = {}
        """Added up, where a stage comes again."""
        self.now: Stage | None = None
        self._parent = parent
        self._since = self.started
        self._span: Span | None = None

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def enter(self, stage: Stage) -> None:
        self.leave()
        self.now = stage
        self._since = time.perf_counter()
        self._span = start_span(stage, {}, self._parent, self._since)

    def leave(self, error: str | None = None) -> None:
        if self.now is None or self._span is None:
            return
        now = time.perf_counter()
        self.seconds[self.now] = self.seconds.get(self.now, 0.0) + now - self._since
        if error is not None:
            fail_span(self._span, error)
        self._span.end(nanoseconds(now))
        self.now = self._span = None
