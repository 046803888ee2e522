"""A response, whole or as a stream of events."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec

from mlx_server.api.chunk_template import ChunkTemplate
from mlx_server.api.generation import Accepted
from mlx_server.api.http.wire import Failure, StreamEvent
from mlx_server.api.openai.responses.output import Item, OutputWriter
from mlx_server.api.openai.responses.tools import Named
from mlx_server.errors import ContextLengthExceeded, ServerError
from mlx_server.events import event
from mlx_server.schemas.internal import Event, Usage
from mlx_server.schemas.openai.responses.answers import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseBody,
    ResponseFault,
    ResponseUsage,
)
from mlx_server.schemas.openai.responses.requests import ResponseRequest
from mlx_server.services.records import RecordNotFound, RecordsFailed

TOLD_CODES = frozenset({"rate_limit_exceeded", "context_length_exceeded"})
"""What clients act on."""
DEFAULT_FORMAT = {"type": "text"}

log = logging.getLogger(__name__)

Keep = Callable[[ResponseBody], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a response is made with."""

    body: ResponseRequest
    named: dict[str, Named]
    seal: Callable[[str], str] | None
    keep: Keep | None


class ResponseWriter:
    """Formats whole answers and streams alike."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._events: list[StreamEvent] = []
        self._asked = asked_fields(setting.body)
        self._response = self._begun(setting.body)
        self._streams = setting.body.stream
        reasoning = setting.body.reasoning
        self._output = OutputWriter(
            setting.named,
            summary=bool(reasoning.summary or reasoning.generate_summary),
            seal=setting.seal,
            tell=self._tell,
            tell_delta=self._tell_delta,
        )
        self._deltas: ChunkTemplate[tuple[str, int]] = ChunkTemplate(self._delta)
        self._place: dict[str, Any] = {}

    def accepted(self, accepted: Accepted) -> "ResponseWriter":
        self._response.model = accepted.model
        return self

    # the parts of a stream

    def begin(self) -> Sequence[StreamEvent]:
        self._tell_response("response.created")
        self._tell_response("response.in_progress")
        return self._taken()

    def feed(self, prompt: int, event: Event) -> Sequence[StreamEvent]:
        self._output.feed(event)
        return self._taken()

    def idle(self) -> StreamEvent:
        return self._of_response("response.in_progress")

    def end(self, usage: Usage) -> Sequence[StreamEvent]:
        self._tell_response(f"response.{self._response.status}")
        return self._taken()

    def failed(self, failure: Failure) -> StreamEvent:
        code = failure.code if failure.code in TOLD_CODES else "server_error"
        self._response.status = "failed"
        self._response.error = ResponseFault(code=str(code), message=failure.message)
        return self._of_response("response.failed")

    def refused(self, error: ServerError) -> Sequence[StreamEvent] | None:
        if not isinstance(error, ContextLengthExceeded):
            return None
        failure = Failure(
            status=error.status,
            type=error.type,
            code=error.code,
            message=error.message,
            param=error.param,
            request_id="",
        )
        return [*self.begin(), self.failed(failure)]

    # a whole answer

    def body(self, usage: Usage) -> bytes:
        return self._response.to_json()

    # both

    async def keep(self, usage: Usage) -> None:
        """Complete the response, and store it. What cannot be stored is answered all the same."""
        response = self._response
        response.usage = usage_body(usage)
        response.output = self._output.items
        response.completed_at = int(time.time())
        response.status = "incomplete" if self._output.cut_off else "completed"
        if self._output.cut_off:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        if self._setting.keep is None:
            return
        try:
            await self._setting.keep(response)
        except (RecordsFailed, RecordNotFound) as error:
            log.warning(event("response_not_stored", response=response.id, error=error.message))
            response.store = False

    def _begun(self, body: ResponseRequest) -> ResponseBody:
        return ResponseBody(
            id=f"resp_{uuid4().hex}",
            object="response",
            created_at=int(time.time()),
            status="in_progress",
            background=False,
            error=None,
            incomplete_details=None,
            model=body.model,
            output=[],
            store=self._setting.keep is not None,
            usage=None,
            **self._asked,
        )

    def _tell(self, kind: str, fields: dict[str, Any]) -> None:
        if self._streams:
            data = msgspec.json.encode({"type": kind} | fields)
            self._events.append(StreamEvent(data, kind))

    def _tell_delta(self, kind: str, place: dict[str, Any], text: str, scores: list[Any]) -> None:
        if not self._streams:
            return
        if scores:
            self._tell(kind, place | {"delta": text, "logprobs": scores})
            return
        self._place = place
        data = self._deltas.fill((kind, place["output_index"]), text)
        self._events.append(StreamEvent(data, kind))

    def _delta(self, key: tuple[str, int], text: str) -> bytes:
        scores: dict[str, Any] = {"logprobs": []} if "output_text" in key[0] else {}
        return msgspec.json.encode({"type": key[0]} | scores | self._place | {"delta": text})

    def _tell_response(self, kind: str) -> None:
        self._events.append(self._of_response(kind))

    def _of_response(self, kind: str) -> StreamEvent:
        return StreamEvent(b'{"type":"%b","response":%b}' % (kind.encode(), self._json()), kind)

    def _json(self) -> bytes:
        return self._response.to_json()

    def _taken(self) -> Sequence[StreamEvent]:
        events, self._events = self._events, []
        return events


def asked_fields(body: ResponseRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    conversation = body.conversation_id
    form = body.text.format.model_dump(by_alias=True, exclude_none=True)
    if form["type"] == "json_schema":
        form = {"name": "answer"} | form
    text: dict[str, Any] = {"format": form, "verbosity": body.text.verbosity or "medium"}
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens or None,
        "max_tool_calls": body.max_tool_calls,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": body.temperature,
        "text": text,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": [_tool(one.model_dump(exclude_none=True)) for one in body.tools],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": body.truncation,
        "user": body.user,
        "metadata": body.metadata,
    }


def _tool(tool: Item) -> Item:
    if tool["type"] == "namespace":
        return {"description": ""} | tool | {"tools": [_tool(one) for one in tool["tools"]]}
    return tool


def usage_body(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )
