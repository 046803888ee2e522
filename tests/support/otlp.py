"""A receiver of traces: OTLP over HTTP, as collectors speak it."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

PENDING = "pending_span"
"""Logfire announces spans that have only begun."""


@dataclass(frozen=True)
class Node:
    """A span, with those below it in the order of their starts."""

    name: str
    attributes: dict[str, Any]
    failed: bool
    began: int
    parent: bytes
    below: list["Node"] = field(default_factory=list)

    def names(self) -> list[str]:
        return [node.name for node in self.below]

    def child(self, name: str) -> "Node":
        return next(node for node in self.below if node.name == name)


class Receiver:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._spans: dict[bytes, list[Span]] = {}
        """By trace."""
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = _attributes(resource.resource.attributes)
            self.services.add(named["service.name"])
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._spans.setdefault(span.trace_id, []).append(span)

    def tree(self, trace_id: str) -> Node | None:
        """The root span of that trace, once it has come: those below it may come earlier."""
        spans = [one for one in self._spans.get(bytes.fromhex(trace_id), []) if not _pending(one)]
        if not any(one.kind == Span.SPAN_KIND_SERVER for one in spans):
            return None
        nodes = {
            one.span_id: Node(
                one.name,
                _attributes(one.attributes),
                one.status.code == Status.STATUS_CODE_ERROR,
                one.start_time_unix_nano,
                one.parent_span_id,
            )
            for one in sorted(spans, key=lambda span: span.start_time_unix_nano)
        }
        roots = []
        for node in nodes.values():
            if node.parent in nodes:
                nodes[node.parent].below.append(node)
            else:
                roots.append(node)
        return roots[0] if len(roots) == 1 else None


def _pending(span: Span) -> bool:
    return _attributes(span.attributes).get("logfire.span_type") == PENDING


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                receiver.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
