"""An engine to its callers: requests outlive its processes."""

import logging
from collections.abc import Iterable

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Embed, Generate, Row
from mlx_server.errors import EngineFailed, ServerError
from mlx_server.events import event
from mlx_server.models.pool.blame import Blame
from mlx_server.models.pool.open_requests import OpenEmbedding, OpenGeneration, OpenRequest
from mlx_server.models.pool.stream import UNWATCHED, RowStream, Watcher

log = logging.getLogger("mlx_server.supervisor")


class ResumableEngine:
    """A model's open requests, sent to the attached process or waiting for one."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.progressed = False
        self._process: EngineClient | None = None
        self._open: dict[int, OpenRequest] = {}
        self._next_id = 0
        self._blame = Blame()
        self._failure: ServerError | None = None

    @property
    def in_flight(self) -> int:
        return len(self._open)

    # for callers

    def generate(
        self, requests: list[Generate], request_id: str, watcher: Watcher = UNWATCHED
    ) -> RowStream:
        """Uses ids of our own; `request_id` is the client's. Raises the engine's final failure."""
        stream = self._new_stream(len(requests), watcher)
        for id_, request in zip(stream.ids, requests, strict=True):
            opened = OpenGeneration(id_, request, request_id, stream, self._on_progress)
            self._open[id_] = opened
        self._send_waiting()
        return stream

    def embed(self, request: Embed, request_id: str, watcher: Watcher = UNWATCHED) -> RowStream:
        stream = self._new_stream(1, watcher)
        id_ = stream.ids.start
        self._open[id_] = OpenEmbedding(id_, request, request_id, stream, self._on_progress)
        self._send_waiting()
        return stream

    # for streams

    def abort(self, ids: Iterable[int]) -> None:
        gone = [request for id_ in ids if (request := self._open.pop(id_, None)) is not None]
        self._recall(gone)

    def pause(self, ids: Iterable[int]) -> None:
        """Take back from the engine; results so far stay."""
        paused = [request for id_ in ids if (request := self._open.get(id_)) is not None]
        for request in paused:
            request.paused = True
        self._recall(paused)
        for request in paused:
            request.engine_id, self._next_id = self._next_id, self._next_id + 1

    def resume(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            if (request := self._open.get(id_)) is not None:
                request.paused = False
        self._send_waiting()

    # for the supervisor

    def attach(self, process: EngineClient) -> None:
        self._process = process
        self.progressed = False
        self._send_waiting()

    def detach(self, evidence: int) -> None:
        self._process = None
        sent = [request for request in self._open.values() if request.sent]
        for stream in {request.stream for request in sent if request.begun}:
            stream.watcher.engine_ended()
        if (culprit := self._blame.engine_ended(sent, evidence)) is not None:
            self._convict(culprit)
        for request in list(self._open.values()):
            request.take_back()
            if request.complete:
                request.put(Row(request.id, [], "length"))

    def fail(self, error: ServerError) -> None:
        """Fail present and future requests; the first error stays."""
        self._failure = self._failure or error
        for request in list(self._open.values()):
            request.fail_stream(error)

    def _new_stream(self, requests: int, watcher: Watcher) -> RowStream:
        if self._failure is not None:
            raise self._failure
        ids = range(self._next_id, self._next_id + requests)
        self._next_id = ids.stop
        return RowStream(self, ids, watcher)

    def _recall(self, requests: list[OpenRequest]) -> None:
        if self._process is not None:
            self._process.abort([request.engine_id for request in requests if request.sent])
        for request in requests:
            request.take_back()
        if self._blame.acquit(requests):
            self._send_waiting()

    def _on_progress(self, request: OpenRequest, ended: bool) -> None:
        self.progressed = True
        if ended:
            self._open.pop(request.id, None)
        if self._blame.acquit([request]):
            self._send_waiting()

    def _send_waiting(self) -> None:
        if self._process is None:
            return
        waiting = [r for r in self._open.values() if not (r.sent or r.paused)]
        for request in self._blame.next_to_run(waiting):
            request.sent = True
            self._process.submit(request.remaining(), request)

    def _convict(self, request: OpenRequest) -> None:
        log.error(event("request_blamed", model=self.model_id, request_id=request.request_id))
        message = (
            "The model's engine ended each time that it worked on this request. "
            f"Quote this id when you report it: {request.request_id}"
        )
        request.fail_stream(EngineFailed(message))
