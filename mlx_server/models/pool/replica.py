"""One of a model's engines to its supervisor: what was sent to it, and whether it is there."""

from typing import TYPE_CHECKING

from mlx_server.engine.client import EngineClient
from mlx_server.errors import ServerError
from mlx_server.models.pool.blame import Blame
from mlx_server.models.pool.routing import SentPrefixes

if TYPE_CHECKING:
    from mlx_server.models.pool.open_requests import OpenRequest
    from mlx_server.models.pool.resumable import ResumableEngine


class Replica:
    """`process` is None while there is none. `blame` tries requests that keep ending it. `given_up`
    is why it will not come back, `refused` why the machine does not start it that it waits for.
    """

    def __init__(self, engine: "ResumableEngine") -> None:
        self.process: EngineClient | None = None
        self.progressed = False
        self.given_up: str | None = None
        self.refused: str | None = None
        self.requests: dict[int, OpenRequest] = {}
        """Sent to it and not ended."""
        self.blame = Blame()
        self.prefixes = SentPrefixes()
        self.sent_count = 0
        self._engine = engine

    @property
    def model_id(self) -> str:
        return self._engine.model_id

    @property
    def in_flight(self) -> int:
        """Of the model, at all its engines or waiting for one."""
        return self._engine.in_flight

    @property
    def open(self) -> bool:
        """Whether it takes any request."""
        return self.process is not None and not self.blame.trying

    def send(self, request: "OpenRequest") -> None:
        assert self.process is not None
        request.replica = self
        self.requests[request.id] = request
        self.sent_count += 1
        self.process.submit(request.remaining(), request)

    def recall(self, requests: "list[OpenRequest]") -> None:
        """Take these back, as far as they were sent here."""
        mine = [request for request in requests if request.replica is self]
        if self.process is not None:
            self.process.abort([request.engine_id for request in mine])
        for request in mine:
            self.forget(request)
            request.take_back()

    def forget(self, request: "OpenRequest") -> None:
        """It has ended."""
        self.requests.pop(request.id, None)

    # for the supervisor

    def attach(self, process: EngineClient) -> None:
        self.process = process
        self.refused = None
        self.progressed = False
        self._engine.send_waiting()

    def detach(self, evidence: int) -> None:
        self.process = None
        self.prefixes.clear()
        sent = list(self.requests.values())
        self.requests.clear()
        self._engine.take_back(self, sent, evidence)

    def fail(self, error: ServerError) -> None:
        self._engine.fail(error)
