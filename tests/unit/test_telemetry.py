"""Spans as they would be exported, and the timing of answers."""

import pytest
from logfire.testing import CaptureLogfire
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from mlx_server.engine.protocol import Sampling
from mlx_server.errors import ContextLengthExceeded
from mlx_server.schemas.internal import (
    Caller,
    ChatPrompt,
    Finished,
    InferenceRequest,
    Prompt,
    TextPrompt,
    Usage,
)
from mlx_server.telemetry import Metrics, RequestTimer, embeddings_span, inference_span, load_span

CALLER = Caller("req-1")


def exported(capfire: CaptureLogfire) -> ReadableSpan:
    """The one span that has ended."""
    spans = capfire.exporter.exported_spans
    pending = {"logfire.span_type": "pending_span"}.items()
    [span] = [one for one in spans if not pending <= dict(one.attributes or {}).items()]
    return span


def attributes(capfire: CaptureLogfire) -> dict[str, object]:
    return dict(exported(capfire).attributes or {})


def test_an_inference_has_a_span_of_its_request_and_its_answer(capfire: CaptureLogfire) -> None:
    request = InferenceRequest(
        "alias", ChatPrompt([]), CALLER, Sampling(temperature=0.5), seed=7, max_tokens=9, n=2
    )
    with inference_span(request) as span:
        span.model("model")
        span.first_token()
        span.first_token()
        span.finished(Finished(0, "stop", Usage(5, 3, cached_tokens=4)))
        span.finished(Finished(1, "length", Usage(5, 9, cached_tokens=4)))
    assert exported(capfire).name == "chat alias"
    assert (
        attributes(capfire).items()
        >= {
            "gen_ai.operation.name": "chat",
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
    assert "gen_ai.server.time_to_first_token" in attributes(capfire)


@pytest.mark.parametrize("prompt", [TextPrompt("a secret"), ChatPrompt([{"content": "a secret"}])])
def test_no_text_of_a_prompt_is_in_a_span(capfire: CaptureLogfire, prompt: Prompt) -> None:
    with inference_span(InferenceRequest("m", prompt, CALLER)):
        pass
    assert "secret" not in exported(capfire).to_json()


def test_embeddings_have_a_span(capfire: CaptureLogfire) -> None:
    with embeddings_span("alias", 3, "req-1") as span:
        span.accepted("model", 12)
    assert exported(capfire).name == "embeddings alias"
    assert (
        attributes(capfire).items()
        >= {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.request.model": "alias",
            "gen_ai.response.model": "model",
            "gen_ai.usage.input_tokens": 12,
            "mlx_server.inputs": 3,
            "mlx_server.request_id": "req-1",
        }.items()
    )


def test_a_load_that_fails_marks_its_span_with_the_kind_of_error(capfire: CaptureLogfire) -> None:
    def load() -> None:
        with load_span("m") as span:
            span.loaded(device="cpu")
            raise ContextLengthExceeded("a secret")

    with pytest.raises(ContextLengthExceeded):
        load()
    assert exported(capfire).status.status_code is StatusCode.ERROR
    assert (
        attributes(capfire).items()
        >= {
            "error.type": "ContextLengthExceeded",
            "mlx_server.device": "cpu",
        }.items()
    )
    assert "secret" not in exported(capfire).to_json()


def test_a_request_counts_once_and_each_choices_gaps_are_its_own() -> None:
    metrics = Metrics()
    timer = RequestTimer(metrics)
    timer.opened("m")
    for choice in ((0, 0), (0, 1), (0, 0), (0, 0)):
        timer.text(choice)
    timer.finished(Usage(5, 7, cached_tokens=4))

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"mlx_server_{name}", {"model": "m"})

    assert value("time_to_first_token_seconds_count") == 1
    assert value("inter_token_latency_seconds_count") == 2
    assert value("e2e_request_latency_seconds_count") == 1
    assert value("prompt_tokens_total") == 5
    assert value("prompt_tokens_cached_total") == 4
    assert value("generation_tokens_total") == 7
