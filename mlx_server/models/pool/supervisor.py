"""An engine that outlives its processes: when one ends or hangs, the next takes its requests on.

What a request got so far is kept here. Sent again with those tokens at the end of its prompt, it
goes on as if nothing had happened, because the engine's randomness depends on the seed and the
position alone. A request that keeps ending engines is found out and fails by itself.
"""

import asyncio
import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from mlx_server.engine.client import EngineClient, RowStream
from mlx_server.engine.protocol import Embed, Failed, Generate, Row, Stats
from mlx_server.errors import EngineFailed, LoadCrashed, ServerError, Unavailable
from mlx_server.events import event

MOST_LOADS = 3
"""Loads in a row that may crash before the model is given up."""
SHORTEST_DELAY = 0.25
LONGEST_DELAY = 30.0
"""Seconds before the next load, doubled each time, after engines that gave no token at all."""
CRASH, KILL = 2, 1
"""What the end of an engine says against the requests it worked on. SIGKILL comes from without, for
reasons of its own as a rule, but may be the answer to memory that a request takes."""
SUSPICION = 4
PROOF = 6
"""From when on a request is tried alone, and is convicted: by a third crash, or a sixth kill."""
HANG_TURNS = 20
"""An engine is silent for too long when it is for this many times its longest turn, or more."""
HANG_CHECKS = 10
"""How many looks in a row an engine must be silent at. Looks, and not seconds, are counted because
a front that was stopped, or slept with its machine, has read nothing all the while."""
SHARE_AFTER_KILL = 0.5
"""Of its KV memory, what an engine uses at first whose predecessor was killed from without, which
is how systems deal with a lack of memory. It takes more by itself as time passes."""
RESUMED_PRIORITY = -(1 << 31)
"""Before all others: what was running takes its place again before anything begins."""

log = logging.getLogger("mlx_server.supervisor")

StartEngine = Callable[[float], Awaitable[EngineClient]]
"""Starts an engine that uses so much of its KV memory at first."""


class OpenRequest(ABC):
    """A request that has not ended: what was asked, and all that came of it so far.

    `evidence` weighs the ends of engines that worked on it, since its latest token.
    """

    def __init__(
        self, id_: int, request_id: str, stream: RowStream, supervisor: "SupervisedEngine"
    ) -> None:
        self.id = id_
        self.engine_id = id_
        """What the engine calls it: another name each time it is taken up again, as what was made
        under the last one may still be on its way."""
        self.request_id = request_id
        self.evidence = 0
        self.paused = False
        """Whether its reader has to catch up first."""
        self.sent = False
        self.begun = False
        """Whether the present engine works on it."""
        self._stream = stream
        self._supervisor = supervisor
        self._resumed = False

    @property
    def suspect(self) -> bool:
        return self.evidence >= SUSPICION

    @property
    @abstractmethod
    def spent(self) -> bool:
        """Whether all of it has come but the word that it has ended."""

    @property
    @abstractmethod
    def rest(self) -> Generate | Embed:
        """What remains to be computed."""

    @abstractmethod
    def _kept(self, row: Row) -> Row:
        """Keep what `row` brings; returns what of it is news."""

    def begin(self) -> None:
        """The engine is about to work on it."""
        self.begun = True
        self._stream.begin()

    def put(self, item: Row | Failed | EngineFailed) -> None:
        """Keep what arrived and pass it on; an engine's end is for the supervisor to see to."""
        if isinstance(item, EngineFailed):
            return
        ended = True
        if item.id != self.id:
            item = msgspec.structs.replace(item, id=self.id)
        if isinstance(item, Row):
            ended = item.finish is not None
            item = self._kept(item)
        self.evidence = 0
        self._stream.put(item)
        self._supervisor.progressed(self, ended)

    def take_back(self) -> None:
        """The engine has ended, or is not to go on with it."""
        self._resumed = self._resumed or self.begun
        self.sent = self.begun = False

    def fail(self, error: ServerError) -> None:
        """End it, and with it all that was asked for together with it."""
        self._stream.fail(error)

    def _priority(self, asked: int) -> int:
        return RESUMED_PRIORITY if self._resumed else asked


class OpenGeneration(OpenRequest):
    """A request for tokens, and those that came."""

    def __init__(
        self, request: Generate, request_id: str, stream: RowStream, supervisor: "SupervisedEngine"
    ) -> None:
        super().__init__(request.id, request_id, stream, supervisor)
        self._request = request
        self._tokens: list[int] = []
        self._reported = False

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self._request.max_tokens - len(self._tokens)

    @property
    def spent(self) -> bool:
        return bool(self._tokens) and self.left <= 0

    @property
    def rest(self) -> Generate:
        request = self._request
        return msgspec.structs.replace(
            request,
            id=self.engine_id,
            prompt=request.prompt + self._tokens,
            generated=request.generated + len(self._tokens),
            max_tokens=self.left,
            prompt_logprobs=None if self._reported else request.prompt_logprobs,
            priority=self._priority(request.priority),
        )

    def _kept(self, row: Row) -> Row:
        self._tokens += row.tokens
        if self._reported and row.cached is not None:
            # Told before, of the prompt as it came; these are the tokens generated, too.
            row = msgspec.structs.replace(row, cached=None)
        self._reported = True
        return row


class OpenEmbedding(OpenRequest):
    """A request for vectors, and the texts whose vectors have not come."""

    def __init__(
        self, request: Embed, request_id: str, stream: RowStream, supervisor: "SupervisedEngine"
    ) -> None:
        super().__init__(request.id, request_id, stream, supervisor)
        self._request = request
        self._missing = list(request.texts)
        """What has come is empty here."""

    @property
    def spent(self) -> bool:
        return not any(self._missing)

    @property
    def rest(self) -> Embed:
        return msgspec.structs.replace(
            self._request,
            id=self.engine_id,
            texts=self._missing,
            priority=self._priority(self._request.priority),
        )

    def _kept(self, row: Row) -> Row:
        for index, _ in row.vectors or ():
            self._missing[index] = []
        return row


class SupervisedEngine:
    """The engine of a loaded model, whichever process that is.

    It is used as an `EngineClient` is, and no end of a process shows. Whoever owns it awaits
    `ended`, and then calls `restart` or `fail`. Meanwhile requests are kept.
    """

    def __init__(self, engine: EngineClient, start: StartEngine, hang_timeout: float) -> None:
        self.model_id = engine.model_id
        self._engine = engine
        self._start = start
        self._hang_timeout = hang_timeout
        self._open: dict[int, OpenRequest] = {}
        self._next_id = 0
        self._serving = True
        self._on_trial: OpenRequest | None = None
        self._failure: ServerError | None = None
        self._progressed = False
        self._fruitless = 0
        """Engines in a row that ended without having given anything."""
        self._kv_share = 1.0
        self._ended_at = 0.0

    @property
    def restarting(self) -> bool:
        """Whether there is no process to work on requests, but is to be one."""
        return not self._serving

    @property
    def pid(self) -> int | None:
        return self._engine.pid if self._serving else None

    @property
    def stats(self) -> Stats | None:
        return self._engine.stats if self._serving else None

    @property
    def in_flight(self) -> int:
        """Requests that wait for tokens."""
        return len(self._open)

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The end of what the process wrote to standard error."""
        return tuple(self._engine.last_lines)

    # requests

    def generate(self, requests: list[Generate], request_id: str) -> RowStream:
        """Take `requests` on, under ids of our own; returns the stream of their rows.

        `request_id` is what their client knows them by. Raises what has ended the engine for good.
        """
        stream = self._new_stream(len(requests))
        for id_, request in zip(stream.ids, requests, strict=True):
            named = msgspec.structs.replace(request, id=id_)
            self._open[id_] = OpenGeneration(named, request_id, stream, self)
        self._send_what_may()
        return stream

    def embed(self, request: Embed, request_id: str) -> RowStream:
        """Take `request` on, as `generate` does; its rows carry vectors."""
        stream = self._new_stream(1)
        named = msgspec.structs.replace(request, id=stream.ids.start)
        self._open[named.id] = OpenEmbedding(named, request_id, stream, self)
        self._send_what_may()
        return stream

    def _new_stream(self, requests: int) -> RowStream:
        if self._failure is not None:
            raise self._failure
        ids = range(self._next_id, self._next_id + requests)
        self._next_id = ids.stop
        return RowStream(self, ids)

    def abort(self, ids: Iterable[int]) -> None:
        """Give up those of these requests that have not ended."""
        gone = [request for id_ in ids if (request := self._open.pop(id_, None)) is not None]
        self._engine.abort([request.engine_id for request in gone if request.sent])
        if self._on_trial in gone:
            self._acquit()

    def pause(self, ids: Iterable[int]) -> None:
        """Take these back from the engine; what they got so far is kept."""
        held = [request for id_ in ids if (request := self._open.get(id_)) is not None]
        self._engine.abort([request.engine_id for request in held if request.sent])
        for request in held:
            request.engine_id, self._next_id = self._next_id, self._next_id + 1
            request.paused = True
            request.take_back()
        if self._on_trial in held:
            self._acquit()

    def resume(self, ids: Iterable[int]) -> None:
        """Send them again, to go on where they were."""
        for id_ in ids:
            if (request := self._open.get(id_)) is not None:
                request.paused = False
        self._send_what_may()

    def progressed(self, request: OpenRequest, ended: bool) -> None:
        """Called when something came for `request`, which shows that it does no harm."""
        self._progressed = True
        if ended:
            self._open.pop(request.id, None)
        if request is self._on_trial:
            self._acquit()

    def _acquit(self) -> None:
        self._on_trial = None
        self._send_what_may()

    def _send_what_may(self) -> None:
        """Send what waits here: suspects one at a time and first, the others after the last."""
        if not self._serving or self._on_trial is not None:
            return
        unsent = [
            request for request in self._open.values() if not (request.sent or request.paused)
        ]
        self._on_trial = next((request for request in unsent if request.suspect), None)
        for request in unsent if self._on_trial is None else [self._on_trial]:
            request.sent = True
            self._engine.submit(request.rest, request)

    # processes

    async def ended(self) -> None:
        """Wait until the process has ended, or is silent for too long and has been killed.

        Then what it had is taken back, and whoever is to blame for its end has failed.
        """
        hung = await self._closed_or_hung()
        self._serving = False
        self._ended_at = time.monotonic()
        await self._engine.kill()
        log.error(
            event(
                "engine_ended",
                model=self.model_id,
                pid=self._engine.pid,
                how=self._engine.how_it_ended,
                requests=len(self._open),
            )
        )
        self._fruitless = 0 if self._progressed else self._fruitless + 1
        killed = self._engine.process.returncode == -signal.SIGKILL and not hung
        self._kv_share = SHARE_AFTER_KILL if killed else 1.0
        self._blame(KILL if killed else CRASH)
        for request in list(self._open.values()):
            request.take_back()
            if request.spent:
                request.put(Row(request.id, [], "length"))

    async def restart(self) -> None:
        """Start the next process and send it what is open. Raises ServerError when it cannot load.

        What crashes while it loads is tried again a few times; what cannot be loaded is not.
        """
        self._engine = await self._loaded()
        self._progressed = False
        self._serving = True
        log.warning(
            event(
                "engine_restarted",
                model=self.model_id,
                pid=self._engine.pid,
                seconds=time.monotonic() - self._ended_at,
                requests=len(self._open),
            )
        )
        self._send_what_may()

    def fail(self, error: ServerError) -> None:
        """Let go of all requests, which get `error`, as will whoever comes later."""
        self._failure = error
        for request in list(self._open.values()):
            request.fail(error)

    async def stop(self) -> None:
        """End the process. Nobody may be in `ended` or `restart` any more."""
        self.fail(Unavailable(f"The model `{self.model_id}` is being stopped."))
        await self._engine.stop()

    async def _closed_or_hung(self) -> bool:
        """Wait for either; says whether it hangs."""
        engine = self._engine
        silent = 0
        while silent <= HANG_CHECKS:
            heard = engine.heard
            try:
                async with asyncio.timeout(self._patience() / HANG_CHECKS):
                    await engine.closed.wait()
                    return False
            except TimeoutError:
                silent = silent + 1 if engine.in_flight and engine.heard == heard else 0
        log.error(
            event("engine_hung", model=self.model_id, pid=engine.pid, seconds=self._patience())
        )
        return True

    def _patience(self) -> float:
        """Seconds for which an engine that has work may be silent."""
        stats = self._engine.stats
        longest = stats.longest_turn if stats is not None else 0.0
        return max(self._hang_timeout, HANG_TURNS * longest)

    def _blame(self, evidence: int) -> None:
        """Hold the engine's end against what it worked on; against a request on trial, alone.

        If it had begun with nothing, taking a request may have been too much for it.
        """
        sent = [request for request in self._open.values() if request.sent]
        blamed = [request for request in sent if request.begun] or sent
        on_trial, self._on_trial = self._on_trial, None
        if on_trial in blamed:
            blamed = [on_trial]
        for request in blamed:
            request.evidence += evidence
        if on_trial in blamed and on_trial.evidence >= PROOF:
            self._convict(on_trial)

    def _convict(self, request: OpenRequest) -> None:
        log.error(event("request_blamed", model=self.model_id, request_id=request.request_id))
        message = (
            "The model's engine ended each time that it worked on this request. "
            f"Quote this id when you report it: {request.request_id}"
        )
        request.fail(EngineFailed(message))

    async def _loaded(self) -> EngineClient:
        for crashes in range(MOST_LOADS):
            await asyncio.sleep(_delay(self._fruitless + crashes))
            try:
                return await self._start(self._kv_share)
            except LoadCrashed as error:
                log.error(event("engine_load_crashed", model=self.model_id, reason=error.message))
                crash = error
        raise crash


def _delay(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    if failures == 0:
        return 0.0
    return min(LONGEST_DELAY, SHORTEST_DELAY * 2.0 ** min(failures - 1, 16))
