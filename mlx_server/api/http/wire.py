"""A protocol's routes and envelope."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.types import Scope

from mlx_server.api.http.limits import Window

HeaderPairs = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Failure:
    status: int
    type: str
    code: str | None
    message: str
    """At most `failures.MAX_MESSAGE` characters; no secrets."""
    param: str | None
    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)


class StreamEvent(NamedTuple):
    """`data` is JSON on one line."""

    data: bytes
    name: str = ""


def _no_headers(request_id: str) -> HeaderPairs:
    return ()


def _no_rate_headers(kind: str, window: Window) -> HeaderPairs:
    return ()


@dataclass(frozen=True, slots=True)
class Wire:
    name: str
    """The protocol's, for operators."""
    error_model: type[BaseModel]
    error_body: Callable[[Failure], bytes]
    error_event: Callable[[Failure], StreamEvent]
    frame: Callable[[StreamEvent, int], bytes]
    """Encodes an event, given its number from 0."""
    ping: bytes
    """Sent at intervals to keep silent streams open. Empty where the format has no comments or
    clients count events: then streams send events that say nothing.
    """
    longest_silence: float = math.inf
    """Seconds between pings, where settings allow for more."""
    end: bytes = b""
    """Follows the last event of a successful stream."""
    media_type: str = "text/event-stream; charset=utf-8"
    headers: Callable[[str], HeaderPairs] = _no_headers
    rate_headers: Callable[[str, Window], HeaderPairs] = _no_rate_headers
    """Rate limit headers; the kind is `requests` or `tokens`."""
    exposed_headers: tuple[str, ...] = ()
    """Readable by pages of other origins."""


@dataclass(frozen=True, slots=True)
class ApiProtocol:
    wire: Wire
    routers: tuple[APIRouter, ...]
    prefixes: tuple[str, ...]
    header: bytes = b""
    """In lower case. Requests that have it are the protocol's below `shared_prefixes` too."""
    shared_prefixes: tuple[str, ...] = ()


class Wires:
    """Finds the `Wire` of a path before routing; the longest prefix wins."""

    def __init__(self, default: Wire, protocols: Sequence[ApiProtocol]) -> None:
        self._default = default
        wires = {prefix: one.wire for one in protocols for prefix in one.prefixes}
        self._by_prefix = sorted(wires.items(), key=lambda pair: len(pair[0]), reverse=True)
        self._by_header = [
            (one.header, prefix, one.wire) for one in protocols for prefix in one.shared_prefixes
        ]

    @property
    def exposed_headers(self) -> list[str]:
        wires = [self._default, *(wire for _, wire in self._by_prefix)]
        return list(dict.fromkeys(name for wire in wires for name in wire.exposed_headers))

    def of(self, path: str, headers: HeaderPairs = ()) -> Wire:
        for header, prefix, wire in self._by_header:
            if _is_below(path, prefix) and any(name == header for name, _ in headers):
                return wire
        for prefix, wire in self._by_prefix:
            if _is_below(path, prefix):
                return wire
        return self._default


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


def wire_of(scope: Scope) -> Wire:
    """Set by `RequestContext`."""
    return cast(Wire, scope["state"]["wire"])


def json_line(event: StreamEvent, number: int) -> bytes:
    """https://github.com/ndjson/ndjson-spec"""
    return event.data + b"\n"


def server_sent(event: StreamEvent, number: int) -> bytes:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    name = b"event: %b\n" % event.name.encode() if event.name else b""
    return b"%bdata: %b\n\n" % (name, event.data)
