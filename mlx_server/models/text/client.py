"""The front's handle on the text process, and on the text side of each model in it."""

import asyncio
import contextlib
import itertools
import logging
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlx_server import errors
from mlx_server.engine.protocol import FrameReader, frame
from mlx_server.engine.spawn import Child, next_line, spawn
from mlx_server.errors import BadRequest, ServerError, Unavailable
from mlx_server.events import event
from mlx_server.models.text.protocol import (
    Chat,
    Close,
    Constrain,
    Decode,
    Decoded,
    Open,
    Opened,
    Parse,
    Parsed,
    Prepared,
    Question,
    Refused,
    Reply,
    Request,
    Text,
    Texts,
    Tokenized,
    decode_reply,
)
from mlx_server.schemas.internal import ChatPrompt, Constraint, Prompt, TextPrompt

RECEIVE_BYTES = 1 << 18
ENDED = "The process that prepares prompts ended; ask again."

R = TypeVar("R", Opened, Prepared, Tokenized, Parsed, Decoded)
Ask = Callable[[int, int], Question]
"""Makes a question of an id and a model's handle."""

log = logging.getLogger("mlx_server.text")


class TextProcessEnded(Unavailable):
    """The process ended before it answered."""


class TextProcess:
    """One process that renders and tokenizes for all models, started when first needed.

    When it ends, requests under way fail and the next one starts another.
    """

    def __init__(self, request_seconds: float) -> None:
        self.request_seconds = request_seconds
        """After which a template or a tokenizer is taken to run for ever."""
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, path: Path, name: str, trust_remote_code: bool) -> "ModelText":
        """The text side of the model folder `path`. Raises ModelLoadFailed."""
        text = ModelText(self, path, name, trust_remote_code)
        await text.reopen()
        return text

    async def ask(self, request: Open | Question, answer: type[R]) -> R:
        """The answer to `request`. Raises what it was refused with."""
        child = await self._started()
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = reply
        try:
            self._send(child, request)
            result = await reply
        finally:
            del self._waiting[request.id]
        if isinstance(result, Refused):
            kind: type[ServerError] = getattr(errors, result.kind)
            raise kind(result.message, param=result.param, code=result.code)
        assert isinstance(result, answer)
        return result

    def next_id(self) -> int:
        """An id for a request."""
        return next(self._ids)

    def tell(self, request: Close) -> None:
        """Send what has no answer."""
        if self._child is not None:
            self._send(self._child, request)

    async def kill(self) -> None:
        """End the process; the next request starts another."""
        child = self._child
        if child is not None:
            await child.kill()
        await asyncio.gather(*self._tasks)

    def serves(self, child: Child | None) -> bool:
        """Whether `child` is the process that runs now."""
        return child is not None and child is self._child

    @property
    def child(self) -> Child | None:
        """The process that runs now."""
        return self._child

    def _send(self, child: Child, request: Request) -> None:
        try:
            child.writer.write(frame(request))
        except (OverflowError, ValueError, TypeError) as error:
            # Numbers beyond 64 bits, which JSON permits.
            raise BadRequest(f"The request holds a value out of range: {error}.") from error
        except RecursionError as error:
            raise BadRequest("The request is nested too deeply.") from error

    async def _started(self) -> Child:
        async with self._starting:
            if self._child is None:
                child = await spawn("mlx_server.models.text.worker")
                assert child.process.stderr is not None
                self._tasks = [
                    asyncio.create_task(self._receive(child)),
                    asyncio.create_task(_relay_log(child.process.stderr)),
                ]
                self._child = child
            return self._child

    async def _receive(self, child: Child) -> None:
        frames = FrameReader()
        with contextlib.suppress(ConnectionError):
            while data := await child.reader.read(RECEIVE_BYTES):
                for body in frames.feed(data):
                    reply = decode_reply(body)
                    waiting = self._waiting.get(reply.id)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(reply)
        self._child = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(TextProcessEnded(ENDED, retry_after=1))
        await child.kill()


class ModelText:
    """The text side of one model: what of it the front keeps, and a way to ask for the rest."""

    def __init__(self, process: TextProcess, path: Path, name: str, trusted: bool) -> None:
        self._process = process
        self._path = path
        self._name = name
        self._trusted = trusted
        self._child: Child | None = None
        self._handle = -1
        self._opening = asyncio.Lock()

    async def reopen(self) -> None:
        """Load the text side in the process that runs now. Raises ModelLoadFailed."""
        async with self._opening:
            if self._process.serves(self._child):
                return
            request = Open(self._process.next_id(), str(self._path), self._name, self._trusted)
            opened = await self._process.ask(request, Opened)
            self._child = self._process.child
            self._handle = opened.id
            self.family = opened.family
            self.capabilities = opened.capabilities
            self.stop_tokens = frozenset(opened.stop_tokens)
            self.syntax = opened.syntax
            self._names = opened.names
            self._pieces = opened.pieces
            self._offsets = array("I")
            self._offsets.frombytes(opened.offsets)

    def close(self) -> None:
        """Forget the text side."""
        if self._process.serves(self._child):
            self._process.tell(Close(self._handle))
        self._child = None

    async def prepare(self, prompt: Prompt, constraint: Constraint | None, limit: int) -> Prepared:
        """A prompt's tokens, and the grammar that its completion is bound to.

        Raises BadRequest when the model has no template or it refuses the messages, or when the
        constraint or a tool cannot be kept; ContextLengthExceeded when it is plain early that
        there are more than `limit` tokens.
        """
        match prompt:
            case ChatPrompt():
                ask: Ask = partial(
                    Chat,
                    messages=prompt.messages,
                    tools=prompt.tools,
                    template_kwargs=prompt.template_kwargs,
                    continue_final=prompt.continue_final,
                    limit=limit,
                    use=prompt.use,
                    thinking_budget=prompt.thinking_budget,
                    constraint=constraint,
                )
                return await self._ask(ask, Prepared)
            case TextPrompt(text=text):
                ask = partial(Text, text=text, limit=limit, constraint=constraint)
                return await self._ask(ask, Prepared)
            case _ if constraint is None:
                return Prepared(0, prompt.ids)
            case _:
                bound = await self._ask(partial(Constrain, constraint=constraint), Prepared)
                return Prepared(bound.id, prompt.ids, bound.grammar)

    async def tokenize_all(self, texts: list[str], limit: int) -> list[list[int]]:
        """Token ids of whole texts, with all that the tokenizer itself puts around one.

        Raises ContextLengthExceeded when it is plain early that one has more than `limit` tokens.
        """
        return (await self._ask(partial(Texts, texts=texts, limit=limit), Tokenized)).tokens

    async def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Names and arguments (JSON objects) of the calls in `text`, none if it is garbled.

        `text` is what stood between the markers of `syntax.calls`.
        """
        return (await self._ask(partial(Parse, text=text, tools=tools), Parsed)).calls

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out."""
        return (await self._ask(partial(Decode, tokens=list(tokens)), Decoded)).text

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that `token` stands for in running text; empty for special tokens."""
        if not 0 <= token < len(self._offsets) - 1:
            return b""
        return self._pieces[self._offsets[token] : self._offsets[token + 1]]

    def visible_bytes(self, token: int) -> bytes:
        """`token_bytes`, and the texts of special tokens that mark thinking or a tool call."""
        marker = self.syntax.visible.get(token)
        return self.token_bytes(token) if marker is None else marker.encode()

    def token_name(self, token: int) -> str:
        """What the vocabulary calls a token that has no bytes."""
        return self._names.get(token) or f"<{token}>"

    async def _ask(self, request: Ask, answer: type[R]) -> R:
        """The answer to what `request` makes of an id and the model's handle."""
        try:
            return await self._ask_once(request, answer)
        except TextProcessEnded:
            # Nothing is lost by asking again, unless this very prompt ends the process.
            return await self._ask_once(request, answer)

    async def _ask_once(self, request: Ask, answer: type[R]) -> R:
        await self.reopen()
        seconds = self._process.request_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._process.ask(
                    request(self._process.next_id(), self._handle), answer
                )
        except TimeoutError as error:
            # A template can loop for ever, and threads cannot be stopped.
            await self._process.kill()
            raise BadRequest(
                f"Preparing this prompt took longer than {seconds:g} seconds."
            ) from error


async def _relay_log(stderr: asyncio.StreamReader) -> None:
    while line := await next_line(stderr):
        log.info(event("text_log", line=line.decode(errors="replace").rstrip()))
