"""Requests that have not ended: asked, received, remaining.

With its tokens so far appended to the prompt, a generation continues in another engine unchanged:
its randomness depends on seed and position alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from mlx_server.engine.protocol import Embed, Failed, Generate, Row
from mlx_server.errors import ServerError
from mlx_server.models.pool.stream import RowStream

if TYPE_CHECKING:
    from mlx_server.models.pool.replica import Replica

RESUMED_PRIORITY = -(1 << 31)


class OpenRequest(ABC):
    """`on_progress` is called for each row or failure, with whether it is the last."""

    def __init__(
        self,
        id_: int,
        request_id: str,
        stream: RowStream,
        on_progress: Callable[["OpenRequest", bool], None],
    ) -> None:
        self.id = id_
        self.engine_id = id_
        """New after each pause, as old rows may still arrive."""
        self.request_id = request_id
        self.evidence = 0
        """Weighted ends of engines since its latest row."""
        self.paused = False
        self.replica: Replica | None = None
        """The engine that it was sent to."""
        self.suspected_by: Replica | None = None
        """The engine that it may have ended, and on which alone it is tried."""
        self.begun = False
        self.stream = stream
        self._on_progress = on_progress
        self._resumed = False

    @property
    def sent(self) -> bool:
        return self.replica is not None

    @property
    @abstractmethod
    def complete(self) -> bool: ...

    @property
    @abstractmethod
    def prompt(self) -> list[int]:
        """What an engine may have computed before; empty if it keeps nothing."""

    @abstractmethod
    def remaining(self) -> Generate | Embed: ...

    @abstractmethod
    def _keep(self, row: Row) -> Row:
        """Record `row`; returns what is new to the reader."""

    def begin(self) -> None:
        self.begun = True
        self.stream.begin()

    def put(self, item: Row | Failed) -> None:
        ended = isinstance(item, Failed) or item.finish is not None
        if item.id != self.id:
            item = msgspec.structs.replace(item, id=self.id)
        if isinstance(item, Row):
            item = self._keep(item)
        self.evidence, self.suspected_by = 0, None
        self.stream.put(item)
        self._on_progress(self, ended)

    def take_back(self) -> None:
        self._resumed = self._resumed or self.begun
        self.replica, self.begun = None, False

    def fail_stream(self, error: ServerError) -> None:
        self.stream.fail(error)

    def _priority(self, asked: int) -> int:
        return RESUMED_PRIORITY if self._resumed else asked


class OpenGeneration(OpenRequest):
    def __init__(
        self,
        id_: int,
        request: Generate,
        request_id: str,
        stream: RowStream,
        on_progress: Callable[[OpenRequest, bool], None],
    ) -> None:
        super().__init__(id_, request_id, stream, on_progress)
        self._request = request
        self._tokens: list[int] = []
        self._has_row = False

    @property
    def complete(self) -> bool:
        return bool(self._tokens) and len(self._tokens) >= self._request.max_tokens

    @property
    def prompt(self) -> list[int]:
        return self._request.prompt + self._tokens

    def remaining(self) -> Generate:
        request = self._request
        return msgspec.structs.replace(
            request,
            id=self.engine_id,
            prompt=self.prompt,
            generated=request.generated + len(self._tokens),
            max_tokens=request.max_tokens - len(self._tokens),
            prompt_logprobs=None if self._has_row else request.prompt_logprobs,
            priority=self._priority(request.priority),
        )

    def _keep(self, row: Row) -> Row:
        self._tokens += row.tokens
        if self._has_row and row.cached is not None:
            # The first engine's count holds; this one includes generated tokens.
            row = msgspec.structs.replace(row, cached=None)
        self._has_row = True
        return row


class OpenEmbedding(OpenRequest):
    def __init__(
        self,
        id_: int,
        request: Embed,
        request_id: str,
        stream: RowStream,
        on_progress: Callable[[OpenRequest, bool], None],
    ) -> None:
        super().__init__(id_, request_id, stream, on_progress)
        self._request = request
        self._missing = list(request.texts)
        """"" where the vector has come."""

    @property
    def complete(self) -> bool:
        return not any(self._missing)

    @property
    def prompt(self) -> list[int]:
        return []

    def remaining(self) -> Embed:
        return msgspec.structs.replace(
            self._request,
            id=self.engine_id,
            texts=self._missing,
            priority=self._priority(self._request.priority),
        )

    def _keep(self, row: Row) -> Row:
        for index, _ in row.vectors or ():
            self._missing[index] = []
        return row
