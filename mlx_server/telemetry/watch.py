"""Watches one prompt from its arrival to its last token: for its record, the metrics, its trace."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from opentelemetry.trace import Span

from mlx_server.engine.protocol import Row
from mlx_server.schemas.internal import Caller, ChatPrompt, Event, Finished, InferenceRequest
from mlx_server.telemetry import content
from mlx_server.telemetry.metrics import Ending, Metrics, ModelMetrics
from mlx_server.telemetry.record import RequestRecord
from mlx_server.telemetry.stages import Stage, Stages
from mlx_server.telemetry.tracing import Attribute, fail_span, start_span

ENGINE_ENDED = "engine_ended"


@dataclass(slots=True)
class Progress:
    """`generated` tokens may exceed what clients are told: some come after a stop string."""

    choices: int
    limit: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    first_token_seconds: float | None = None
    last_token: dict[int, float] = field(default_factory=dict)
    """When it came, by choice."""
    finished: dict[int, Finished] = field(default_factory=dict)

    @property
    def completion_tokens(self) -> int:
        """As the client is told, or sampled where it was not told."""
        if len(self.finished) < self.choices:
            return self.generated
        return sum(one.usage.completion_tokens for one in self.finished.values())

    @property
    def reasoning_tokens(self) -> int:
        return sum(one.usage.reasoning_tokens for one in self.finished.values())

    def finishes(self, error: BaseException | None) -> list[str]:
        told = [self.finished[choice].reason for choice in sorted(self.finished)]
        missing = "stop" if error is None else "error" if isinstance(error, Exception) else "abort"
        return told + [missing] * (self.choices - len(told))


class Watch(AbstractContextManager["Watch"]):
    """What its block raises is how the request ended. Spans follow the GenAI semantic conventions:
    https://github.com/open-telemetry/semantic-conventions-genai
    """

    def __init__(
        self,
        operation: str,
        model: str,
        caller: Caller,
        metrics: Metrics,
        *,
        choices: int = 1,
        attributes: dict[str, Attribute] | None = None,
    ) -> None:
        self.progress = Progress(choices)
        self._metrics = metrics
        self._model: ModelMetrics | None = None
        self._record = caller.record
        self._record.operation = operation
        self._record.model = model or None
        named: dict[str, Attribute] = {"gen_ai.request.model": model} if model else {}
        self._span = start_span(
            f"{operation} {model}".rstrip(),
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "mlx_server",
                "mlx_server.request_id": caller.request_id,
                **named,
                **(attributes or {}),
            },
        )
        self._transcript: content.Transcript | None = None
        self._stream: Span | None = None
        self._stages = Stages(self._span)
        self._stages.enter("load")

    @classmethod
    def generation(cls, request: InferenceRequest, metrics: Metrics, *, streams: bool) -> Self:
        operation = "chat" if isinstance(request.prompt, ChatPrompt) else "text_completion"
        attributes = _asked(request)
        if streams:
            attributes["gen_ai.request.stream"] = True
        watch = cls(
            *(operation, request.model, request.caller, metrics),
            choices=request.n,
            attributes=attributes,
        )
        watch._record.stream = streams
        watch.progress.limit = request.max_tokens
        if content.is_shown():
            watch._span.set_attributes(content.asked(request))
            watch._transcript = content.Transcript(request.n)
        return watch

    @classmethod
    def embeddings(cls, model: str, inputs: int, caller: Caller, metrics: Metrics) -> Self:
        attributes: dict[str, Attribute] = {"mlx_server.inputs": inputs}
        return cls("embeddings", model, caller, metrics, attributes=attributes)

    # by the service

    def loaded(self, model: str) -> None:
        """The answering model's id, never an alias."""
        self._record.model = model
        self._span.set_attribute("gen_ai.response.model", model)
        self._model = self._metrics.of(model)
        self._stages.enter("render")

    def prepared(self, prompt_tokens: int) -> None:
        self.progress.prompt_tokens = prompt_tokens
        self._stages.enter("queue")

    def told(self, events: Sequence[Event]) -> None:
        """What the client is told."""
        if self._transcript is not None:
            self._transcript.add(events)
        if events and isinstance(last := events[-1], Finished):
            self.progress.finished[last.choice] = last
            if len(self.progress.finished) == self.progress.choices:
                self._stages.leave()

    # by the stream of the engine's rows

    def begun(self) -> None:
        """An engine starts on one of the choices, or starts again."""
        stage = self._stages.now
        others_go_on = stage == "decode" and self.progress.choices > 1
        if stage != "prefill" and not others_go_on:
            self._stages.enter("prefill")

    def row(self, choice: int, row: Row) -> None:
        now, progress, model = time.perf_counter(), self.progress, self._model
        if row.cached is not None and not progress.cached_tokens:
            progress.cached_tokens = row.cached
        if not row.tokens or model is None:
            return
        last = progress.last_token.get(choice)
        if last is not None:
            model.inter_token_latency.observe(now - last)
        elif progress.first_token_seconds is None:
            self._first_token(model, now)
        progress.last_token[choice] = now
        progress.generated += len(row.tokens)
        model.generation_tokens.inc(len(row.tokens))
        if self._stages.now != "decode":
            self._stages.enter("decode")

    def paused(self) -> None:
        """The client does not read."""
        self._stages.enter("pause")

    def engine_ended(self) -> None:
        """Another one will go on."""
        self._record.engine_ends += 1
        self._stages.leave(ENGINE_ENDED)
        self._stages.enter("restart")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failure = type(error).__qualname__ if isinstance(error, Exception) else None
        self._stages.leave(failure)
        if self._stream is not None:
            self._stream.end()
        finishes, seconds = self.progress.finishes(error), self._stages.seconds
        _record(self._record, self.progress, finishes, seconds)
        if self._model is not None:
            _measure(self._model, self.progress, finishes, seconds, self._stages.elapsed)
        self._span.set_attributes(_answered(self.progress, finishes))
        if self._transcript is not None:
            self._span.set_attributes(self._transcript.shown())
        if failure is not None:
            fail_span(self._span, failure)
        self._span.end()

    def _first_token(self, model: ModelMetrics, now: float) -> None:
        seconds = now - self._stages.started
        self.progress.first_token_seconds = seconds
        model.time_to_first_token.observe(seconds)
        model.prompt_tokens.inc(self.progress.prompt_tokens)
        model.cached_tokens.inc(self.progress.cached_tokens)
        if self._record.stream:
            self._stream = start_span("stream", {}, self._span, now)


def _asked(request: InferenceRequest) -> dict[str, Attribute]:
    """What the request itself says."""
    sampling = {
        name: getattr(request.sampling, name)
        for name in ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty")
        if name not in request.unasked
    }
    asked: dict[str, Attribute] = {f"gen_ai.request.{k}": value for k, value in sampling.items()}
    if request.n != 1:
        asked["gen_ai.request.choice.count"] = request.n
    if request.max_tokens is not None:
        asked["gen_ai.request.max_tokens"] = request.max_tokens
    if request.seed is not None:
        asked["gen_ai.request.seed"] = request.seed
    if request.constraint is not None:
        json = request.constraint.kind in ("json_schema", "json_object")
        asked["gen_ai.output.type"] = "json" if json else "text"
    return asked


def _answered(progress: Progress, finishes: list[str]) -> dict[str, Attribute]:
    answered: dict[str, Attribute] = {
        "gen_ai.response.finish_reasons": tuple(finishes),
        "gen_ai.usage.input_tokens": progress.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": progress.cached_tokens,
        "gen_ai.usage.output_tokens": progress.completion_tokens,
    }
    if progress.reasoning_tokens:
        answered["gen_ai.usage.reasoning.output_tokens"] = progress.reasoning_tokens
    if progress.first_token_seconds is not None:
        answered["gen_ai.response.time_to_first_chunk"] = progress.first_token_seconds
    return answered


def _record(
    record: RequestRecord, progress: Progress, finishes: list[str], seconds: dict[Stage, float]
) -> None:
    record.prompt_tokens += progress.prompt_tokens
    record.cached_tokens += progress.cached_tokens
    record.completion_tokens += progress.completion_tokens
    record.reasoning_tokens += progress.reasoning_tokens
    record.finish += finishes
    record.first_token_seconds = _longer(record.first_token_seconds, progress.first_token_seconds)
    record.load_seconds = _longer(record.load_seconds, seconds.get("load"))
    record.render_seconds = _longer(record.render_seconds, seconds.get("render"))
    record.queue_seconds = _longer(record.queue_seconds, seconds.get("queue"))
    record.prefill_seconds = _longer(record.prefill_seconds, seconds.get("prefill"))
    record.decode_seconds = _longer(record.decode_seconds, seconds.get("decode"))


def _longer(one: float | None, other: float | None) -> float | None:
    return max((seconds for seconds in (one, other) if seconds is not None), default=None)


def _measure(
    model: ModelMetrics,
    progress: Progress,
    finishes: list[str],
    seconds: dict[Stage, float],
    elapsed: float,
) -> None:
    model.e2e_latency.observe(elapsed)
    for finish in finishes:
        model.endings[_ending(finish)].inc()
    model.request_prompt_tokens.observe(progress.prompt_tokens)
    model.request_choices.observe(progress.choices)
    if progress.limit is not None:
        model.request_max_tokens.observe(progress.limit)
    if "queue" in seconds:
        model.queue_time.observe(seconds["queue"])
    if "prefill" in seconds:
        model.prefill_time.observe(seconds["prefill"])
        model.inference_time.observe(seconds["prefill"] + seconds.get("decode", 0.0))
    if progress.first_token_seconds is not None:
        model.decode_time.observe(seconds.get("decode", 0.0))
        model.request_generation_tokens.observe(progress.generated)
        if progress.generated > progress.choices:
            later = progress.generated - progress.choices
            model.time_per_output_token.observe(
                seconds.get("decode", 0.0) * progress.choices / later
            )
    elif "abort" not in finishes and "error" not in finishes:
        model.prompt_tokens.inc(progress.prompt_tokens)


def _ending(finish: str) -> Ending:
    match finish:
        case "length" | "abort" | "error":
            return finish
    return "stop"
