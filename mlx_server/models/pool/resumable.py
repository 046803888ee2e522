"""An engine to its callers: requests outlive its processes."""

import logging
from collections.abc import Iterable

from mlx_server.engine.protocol import Embed, Generate, Row
from mlx_server.errors import EngineFailed, ServerError
from mlx_server.events import event
from mlx_server.models.pool.blame import SUSPICION
from mlx_server.models.pool.open_requests import OpenEmbedding, OpenGeneration, OpenRequest
from mlx_server.models.pool.replica import Replica
from mlx_server.models.pool.routing import cheapest, marks
from mlx_server.models.pool.stream import UNWATCHED, RowStream, Watcher

log = logging.getLogger("mlx_server.supervisor")


class ResumableEngine:
    """A model's open requests, sent to one of its engines or waiting for one."""

    def __init__(self, model_id: str, replicas: int = 1) -> None:
        self.model_id = model_id
        self.replicas = [Replica(self) for _ in range(replicas)]
        self._open: dict[int, OpenRequest] = {}
        self._next_id = 0
        self._failure: ServerError | None = None

    @property
    def in_flight(self) -> int:
        return len(self._open)

    @property
    def served(self) -> bool:
        """Whether an engine is there, or the first is to come back."""
        present = any(replica.process is not None for replica in self.replicas)
        return present or not self.replicas[0].given_up

    # for callers

    def generate(
        self, requests: list[Generate], request_id: str, watcher: Watcher = UNWATCHED
    ) -> RowStream:
        """Uses ids of our own; `request_id` is the client's. Raises the engine's final failure."""
        stream = self._new_stream(len(requests), watcher)
        for id_, request in zip(stream.ids, requests, strict=True):
            opened = OpenGeneration(id_, request, request_id, stream, self._on_progress)
            self._open[id_] = opened
        self.send_waiting()
        return stream

    def embed(self, request: Embed, request_id: str, watcher: Watcher = UNWATCHED) -> RowStream:
        stream = self._new_stream(1, watcher)
        id_ = stream.ids.start
        self._open[id_] = OpenEmbedding(id_, request, request_id, stream, self._on_progress)
        self.send_waiting()
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
        self.send_waiting()

    # for replicas

    def send_waiting(self) -> None:
        """Send what waits to the engines that take it."""
        waiting = [r for r in self._open.values() if not (r.sent or r.paused)]
        for replica in self.replicas:
            self._try_suspect(replica, [r for r in waiting if r.suspected_by is replica])
        for request in waiting:
            if request.suspected_by is None and (chosen := self._replica_for(request)):
                chosen.send(request)

    def take_back(self, replica: Replica, sent: list[OpenRequest], evidence: int) -> None:
        """`replica` has ended, to which these were `sent`: others go on with them."""
        for stream in {request.stream for request in sent if request.begun}:
            stream.watcher.engine_ended()
        if (culprit := replica.blame.engine_ended(sent, evidence)) is not None:
            self._convict(culprit)
        for request in sent:
            if request.evidence >= SUSPICION:
                request.suspected_by = replica
            request.take_back()
        for request in list(self._open.values()):
            if request.complete and not request.sent:
                request.put(Row(request.id, [], "length"))
        self.send_waiting()

    def give_up(self, replica: Replica, why: str) -> None:
        """It will not come back; others are there."""
        replica.given_up = why
        other = next(one for one in self.replicas if not one.given_up)
        for request in self._open.values():
            if request.suspected_by is replica:
                request.suspected_by = other
        self.send_waiting()

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

    def _try_suspect(self, replica: Replica, suspects: list[OpenRequest]) -> None:
        if replica.process is not None:
            suspect = replica.blame.next_to_try(suspects)
            if suspect is not None:
                replica.send(suspect)

    def _replica_for(self, request: OpenRequest) -> Replica | None:
        ready = [replica for replica in self.replicas if replica.open]
        if len(self.replicas) == 1 or not ready:
            return ready[0] if ready else None
        prompt = marks(request.prompt)
        ready.sort(key=lambda replica: replica.sent_count)  # among equals, turn by turn
        chosen = cheapest(
            ready, lambda one: one.prefixes.known(prompt), lambda one: len(one.requests)
        )
        chosen.prefixes.add(prompt)
        return chosen

    def _recall(self, requests: list[OpenRequest]) -> None:
        for replica in self.replicas:
            replica.recall(requests)
        self._acquit(requests)

    def _acquit(self, requests: list[OpenRequest]) -> None:
        ended = [replica.blame.acquit(requests) for replica in self.replicas]
        if any(ended):
            self.send_waiting()

    def _on_progress(self, request: OpenRequest, ended: bool) -> None:
        if request.replica is not None:
            request.replica.progressed = True
        if ended:
            self._open.pop(request.id, None)
            if request.replica is not None:
                request.replica.forget(request)
        self._acquit([request])

    def _convict(self, request: OpenRequest) -> None:
        log.error(event("request_blamed", model=self.model_id, request_id=request.request_id))
        message = (
            "The model's engine ended each time that it worked on this request. "
            f"Quote this id when you report it: {request.request_id}"
        )
        request.fail_stream(EngineFailed(message))
