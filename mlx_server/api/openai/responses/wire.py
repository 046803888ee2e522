"""The envelope of Responses: OpenAI's, but for streams, whose events have names and numbers."""

from dataclasses import replace

import msgspec

from mlx_server.api.http.wire import Failure, StreamEvent, server_sent
from mlx_server.api.openai import wire

PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""What chat completions call otherwise, in which form responses are asked for."""


def error_body(failure: Failure) -> bytes:
    return wire.error_body(_renamed(failure))


def error_event(failure: Failure) -> StreamEvent:
    failure = _renamed(failure)
    told = {"code": failure.code, "message": failure.message, "param": failure.param}
    return StreamEvent(msgspec.json.encode({"type": "error"} | told), "error")


def _renamed(failure: Failure) -> Failure:
    name = (failure.param or "").partition(".")[0]
    return replace(failure, param=PARAMS.get(name, failure.param))


def frame(event: StreamEvent, number: int) -> bytes:
    numbered = b'{"sequence_number":%d,%b' % (number, event.data[1:])
    return server_sent(StreamEvent(numbered, event.name), number)


WIRE = replace(
    wire.WIRE, error_body=error_body, error_event=error_event, frame=frame, ping=b"", end=b""
)
