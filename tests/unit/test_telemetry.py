"""Requests as they are watched: their spans, their records, the metrics."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from logfire.testing import CaptureLogfire
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from mlx_server.engine.protocol import Row, Sampling
from mlx_server.errors import ContextLengthExceeded
from mlx_server.schemas.internal import (
    Caller,
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    Prompt,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.telemetry.content import SWITCH
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.record import RequestRecord
from mlx_server.telemetry.tracing import load_span
from mlx_server.telemetry.watch import Watch

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class Followed:
    """A request of a model, with what is seen of it."""

    def __init__(self, prompt: Prompt | None = None, *, streams: bool = False, **more: Any) -> None:
        self.metrics = Metrics()
        self.record = RequestRecord()
        caller = Caller("req-1", record=self.record)
        request = InferenceRequest("alias", prompt or ChatPrompt([]), caller, **more)
        self.watch = Watch.generation(request, self.metrics, streams=streams)

    @contextmanager
    def working(self, prompt_tokens: int = 5) -> Iterator[Watch]:
        with self.watch as watch:
            watch.loaded("model")
            watch.prepared(prompt_tokens)
            watch.begun()
            yield watch

    def value(self, name: str, **labels: str) -> float | None:
        known = {"model_name": "model", "engine": "0"} | labels
        return self.metrics.registry.get_sample_value(f"vllm:{name}", known)


def spans(capfire: CaptureLogfire) -> dict[str, ReadableSpan]:
    """Those that have ended, by name."""
    pending = {"logfire.span_type": "pending_span"}.items()
    exported = capfire.exporter.exported_spans
    return {s.name: s for s in exported if not pending <= dict(s.attributes or {}).items()}


def attributes(capfire: CaptureLogfire, name: str) -> dict[str, Any]:
    return dict(spans(capfire)[name].attributes or {})


def finished(choice: int = 0, reason: Any = "stop", tokens: int = 3) -> Finished:
    return Finished(choice, reason, Usage(5, tokens, cached_tokens=4))


# spans


def test_a_generation_has_a_span_of_its_request_and_its_answer(capfire: CaptureLogfire) -> None:
    followed = Followed(sampling=Sampling(temperature=0.5), seed=7, max_tokens=9, n=2)
    with followed.working() as watch:
        watch.row(0, Row(0, [1], cached=4))
        watch.told([finished()])
        watch.told([finished(1, "length", 9)])
    assert (
        attributes(capfire, "chat alias").items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "mlx_server",
            "gen_ai.request.model": "alias",
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.seed": 7,
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.choice.count": 2,
            "gen_ai.response.model": "model",
            "gen_ai.response.finish_reasons": ("stop", "length"),
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.cache_read.input_tokens": 4,
            "gen_ai.usage.output_tokens": 12,
            "mlx_server.request_id": "req-1",
        }.items()
    )


def test_settings_that_a_request_leaves_to_the_model_are_not_in_its_span(
    capfire: CaptureLogfire,
) -> None:
    with Followed(unasked=frozenset({"temperature", "top_p"})).watch:
        pass
    shown = attributes(capfire, "chat alias")
    assert "gen_ai.request.temperature" not in shown
    assert "gen_ai.request.top_k" in shown


def test_each_stage_is_a_span_below_the_requests(capfire: CaptureLogfire) -> None:
    followed = Followed(streams=True)
    with followed.working() as watch:
        watch.row(0, Row(0, [1], cached=0))
        watch.row(0, Row(0, [2], "stop"))
        watch.told([finished()])
    by_name = spans(capfire)
    whole = by_name.pop("chat alias")
    assert set(by_name) == {"load", "render", "queue", "prefill", "decode", "stream"}
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.request.stream"] is True
    assert whole.attributes["gen_ai.response.time_to_first_chunk"]
    for span in by_name.values():
        assert whole.context is not None
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id


def test_an_engines_end_fails_its_stage_and_the_next_engine_has_spans_of_its_own(
    capfire: CaptureLogfire,
) -> None:
    followed = Followed()
    with followed.working() as watch:
        watch.row(0, Row(0, [1], cached=0))
        watch.engine_ended()
        watch.begun()
        watch.row(0, Row(0, [2], "stop"))
        watch.told([finished()])
    assert {"prefill", "decode", "restart"} <= set(spans(capfire))
    failed = [
        s.name
        for s in capfire.exporter.exported_spans
        if (s.attributes or {}).get("error.type") == "engine_ended"
    ]
    assert failed == ["decode"]
    assert followed.record.engine_ends == 1
    assert followed.record.finish == ["stop"]


def test_a_refusal_marks_the_span_with_the_kind_of_error(capfire: CaptureLogfire) -> None:
    followed = Followed()

    def refuse() -> None:
        with followed.watch as watch:
            watch.loaded("model")
            raise ContextLengthExceeded("a secret")

    with pytest.raises(ContextLengthExceeded):
        refuse()
    span = spans(capfire)["chat alias"]
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(capfire, "chat alias")["error.type"] == "ContextLengthExceeded"
    assert attributes(capfire, "render")["error.type"] == "ContextLengthExceeded"
    assert "secret" not in span.to_json()
    assert followed.record.finish == ["error"]


def test_embeddings_have_a_span(capfire: CaptureLogfire) -> None:
    metrics, record = Metrics(), RequestRecord()
    with Watch.embeddings("alias", 3, Caller("req-1", record=record), metrics) as watch:
        watch.loaded("model")
        watch.prepared(12)
    assert (
        attributes(capfire, "embeddings alias").items()
        >= {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.request.model": "alias",
            "gen_ai.response.model": "model",
            "gen_ai.usage.input_tokens": 12,
            "mlx_server.inputs": 3,
            "mlx_server.request_id": "req-1",
        }.items()
    )
    assert (record.operation, record.model, record.prompt_tokens) == ("embeddings", "model", 12)


def test_a_load_that_fails_marks_its_span_with_the_kind_of_error(capfire: CaptureLogfire) -> None:
    def load() -> None:
        with load_span("m") as span:
            span.loaded(device="cpu")
            raise ContextLengthExceeded("a secret")

    with pytest.raises(ContextLengthExceeded):
        load()
    span = spans(capfire)["load m"]
    assert span.status.status_code is StatusCode.ERROR
    wanted = {"error.type": "ContextLengthExceeded", "mlx_server.device": "cpu"}
    assert attributes(capfire, "load m").items() >= wanted.items()
    assert "secret" not in span.to_json()


# content

CONVERSATION = ChatPrompt(
    [
        {"role": "system", "content": "secret one"},
        {"role": "user", "content": "secret two"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "secret three",
            "tool_calls": [
                {"id": "c1", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
            ],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ],
    tools=[TOOL],
)
SAID: list[Event] = [
    ReasoningDelta(0, "secret "),
    ReasoningDelta(0, "thought"),
    TextDelta(0, "secret answer"),
    ToolCallStart(0, 0, "c2", "weather"),
    ToolCallDelta(0, 0, '{"city":'),
    ToolCallDelta(0, 0, '"Rome"}'),
    Finished(0, "tool_calls", Usage(5, 3)),
]


@pytest.mark.parametrize("prompt", [TextPrompt("a secret"), CONVERSATION])
def test_no_text_is_in_a_span_unless_asked_for(
    capfire: CaptureLogfire, monkeypatch: pytest.MonkeyPatch, prompt: Prompt
) -> None:
    for switch in ("", "false", "NO_CONTENT", "EVENT_ONLY"):
        monkeypatch.setenv(SWITCH, switch)
        with Followed(prompt, stop=("secret",)).working() as watch:
            watch.told(SAID)
    assert all("secret" not in span.to_json() for span in capfire.exporter.exported_spans)


@pytest.mark.parametrize("switch", ["true", "SPAN_ONLY", "span_and_event"])
def test_the_standard_switch_shows_the_conversation_in_its_span(
    capfire: CaptureLogfire, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(SWITCH, switch)
    with Followed(CONVERSATION).working() as watch:
        watch.told(SAID)
    shown = attributes(capfire, "chat alias")
    asked = json.loads(shown["gen_ai.input.messages"])
    assert [message["role"] for message in asked] == ["system", "user", "assistant", "tool"]
    assert asked[1]["parts"] == [{"type": "text", "content": "secret two"}]
    assert [part["type"] for part in asked[2]["parts"]] == ["reasoning", "tool_call"]
    assert asked[3]["parts"] == [{"type": "tool_call_response", "id": "c1", "response": "rain"}]
    assert json.loads(shown["gen_ai.tool.definitions"])[0]["name"] == "weather"
    [answer] = json.loads(shown["gen_ai.output.messages"])
    assert answer["finish_reason"] == "tool_call"
    assert answer["parts"] == [
        {"type": "reasoning", "content": "secret thought"},
        {"type": "text", "content": "secret answer"},
        {"type": "tool_call", "id": "c2", "name": "weather", "arguments": '{"city":"Rome"}'},
    ]


# metrics and records


async def test_a_request_counts_once_and_each_choices_gaps_are_its_own() -> None:
    followed = Followed(n=2, max_tokens=10)
    with followed.working() as watch:
        for choice in (0, 1, 0, 0):
            watch.row(choice, Row(choice, [1], cached=4))
        for choice in (0, 1):
            watch.told([finished(choice)])
    assert followed.value("time_to_first_token_seconds_count") == 1
    assert followed.value("inter_token_latency_seconds_count") == 2
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert followed.value(f"{name}_seconds_count") == 1, name
    for name in ("request_decode_time", "request_inference_time", "request_time_per_output_token"):
        assert followed.value(f"{name}_seconds_count") == 1, name
    assert followed.value("prompt_tokens_total") == 5
    assert followed.value("prompt_tokens_cached_total") == 4
    assert followed.value("generation_tokens_total") == 4
    assert followed.value("request_params_max_tokens_sum") == 10
    assert followed.value("request_success_total", finished_reason="stop") == 2


def test_a_record_adds_up_a_requests_prompts() -> None:
    metrics, record = Metrics(), RequestRecord()
    caller = Caller("req-1", record=record)
    for tokens in (5, 7):
        request = InferenceRequest("alias", TextPrompt("x"), caller)
        with Watch.generation(request, metrics, streams=False) as watch:
            watch.loaded("model")
            watch.prepared(tokens)
            watch.begun()
            watch.row(0, Row(0, [1], "stop", cached=2))
            watch.told([Finished(0, "stop", Usage(tokens, 1, cached_tokens=2, reasoning_tokens=1))])
    assert (record.prompt_tokens, record.cached_tokens) == (12, 4)
    assert (record.completion_tokens, record.reasoning_tokens) == (2, 2)
    assert record.finish == ["stop", "stop"]
    for field in ("load", "render", "queue", "prefill", "decode", "first_token"):
        assert getattr(record, f"{field}_seconds") is not None, field


async def test_a_request_whose_client_leaves_is_aborted_with_the_tokens_it_cost() -> None:
    followed = Followed()

    def leave() -> None:
        with followed.working() as watch:
            watch.row(0, Row(0, [1, 2], cached=0))
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        leave()
    assert followed.record.finish == ["abort"]
    assert followed.record.completion_tokens == 2
    assert followed.value("request_success_total", finished_reason="abort") == 1


async def test_what_never_reached_a_model_is_no_figure_of_one() -> None:
    followed = Followed()
    with pytest.raises(ContextLengthExceeded), followed.watch:
        raise ContextLengthExceeded("too long")
    assert followed.value("e2e_request_latency_seconds_count") is None
