"""The envelope of Responses: OpenAI's, but for streams, whose events have names and numbers."""

from dataclasses import replace

import msgspec

from mlx_server.api.http.wire import Failure, StreamEvent, server_sent
from mlx_server.api.openai import wire


def error_event(failure: Failure) -> StreamEvent:
    told = {"code": failure.code, "message": failure.message, "param": failure.param}
    return StreamEvent(msgspec.json.encode({"type": "error"} | told), "error")


def frame(event: StreamEvent, number: int) -> bytes:
    numbered = b'{"sequence_number":%d,%b' % (number, event.data[1:])
    return server_sent(StreamEvent(numbered, event.name), number)


WIRE = replace(wire.WIRE, error_event=error_event, frame=frame, ping=b"", end=b"")
