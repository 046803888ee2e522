"""The front's handles on the text process and on each model's text side."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlx_server import errors
from mlx_server.engine.protocol import FrameReader, frame
from mlx_server.engine.spawn import Child, next_line, spawn
from mlx_server.errors import BadRequest, ServerError, Unavailable
from mlx_server.events import event
from mlx_server.models.text.protocol import (
    Answer,
    Close,
    Decode,
    Decoded,
    Open,
    Opened,
    ParseCalls,
    Parsed,
    Prepare,
    Prepared,
    Question,
    Refused,
    Request,
    Tokenize,
    TokenizeCut,
    Tokenized,
    TokenizePairs,
    decode_reply,
)
from mlx_server.schemas.internal import Constraint, Prompt, TokenPrompt

RECEIVE_BYTES = 1 << 18
ENDED = "The process that prepares prompts ended; ask again."

A = TypeVar("A", Opened, Prepared, Tokenized, Parsed, Decoded)

log = logging.getLogger("mlx_server.text")


class TextProcessEnded(Unavailable):
    """Before it answered."""


class TextProcess:
    """One process that renders and tokenizes for all models, started on first use. When it ends,
    pending requests fail and the next one restarts it.
    """

    def __init__(self, request_seconds: float, stable_prompts: bool = False) -> None:
        self.request_seconds = request_seconds
        """Per template or tokenizer run."""
        self.stable_prompts = stable_prompts
        """Whether what changes with every request is taken out of the way."""
        self.child: Child | None = None
        self.ends = 0
        """Processes that have ended."""
        self._starting = asyncio.Lock()
        self._ids = itertools.count()
        self._pending: dict[int, asyncio.Future[Answer | Refused]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, path: Path, name: str, trust_remote_code: bool) -> "ModelText":
        """Raises ModelLoadFailed."""
        text = ModelText(self, Open(str(path), name, trust_remote_code))
        await text.reopen()
        return text

    def next_id(self) -> int:
        return next(self._ids)

    async def ask(self, model: int, question: Question, answer: type[A]) -> A:
        """Raises TextProcessEnded, or the error that refuses the question."""
        child = await self._started()
        request = Request(self.next_id(), model, question)
        reply: asyncio.Future[Answer | Refused] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = reply
        try:
            _send(child, request)
            body = await reply
        finally:
            del self._pending[request.id]
        if isinstance(body, Refused):
            kind: type[ServerError] = getattr(errors, body.kind)
            raise kind(body.message, param=body.param, code=body.code)
        assert isinstance(body, answer)
        return body

    def close(self, model: int) -> None:
        if self.child is not None:
            _send(self.child, Request(self.next_id(), model, Close()))

    async def kill(self) -> None:
        if self.child is not None:
            await self.child.kill()
        await asyncio.gather(*self._tasks)

    async def _started(self) -> Child:
        async with self._starting:
            if self.child is None:
                child = await spawn("mlx_server.models.text.worker")
                assert child.process.stderr is not None
                self._tasks = [
                    asyncio.create_task(self._receive(child)),
                    asyncio.create_task(_relay_log(child.process.stderr)),
                ]
                self.child = child
            return self.child

    async def _receive(self, child: Child) -> None:
        frames = FrameReader()
        with contextlib.suppress(ConnectionError):
            while data := await child.reader.read(RECEIVE_BYTES):
                for body in frames.feed(data):
                    reply = decode_reply(body)
                    pending = self._pending.get(reply.id)
                    if pending is not None and not pending.done():
                        pending.set_result(reply.body)
        self.child = None
        self.ends += 1
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(TextProcessEnded(ENDED, retry_after=1))
        await child.kill()


class ModelText:
    """One model's text side: the vocabulary is here, the rest in the text process."""

    stop_tokens: frozenset[int]

    def __init__(self, process: TextProcess, source: Open) -> None:
        self._process = process
        self._source = source
        self._child: Child | None = None
        self._model = -1
        self._opening = asyncio.Lock()

    async def reopen(self) -> None:
        """Load the text side if the running process lacks it. Raises ModelLoadFailed."""
        async with self._opening:
            if self._is_open():
                return
            model = self._process.next_id()
            opened = await self._process.ask(model, self._source, Opened)
            self._child = self._process.child
            self._model = model
            self.stop_tokens = frozenset(opened.stop_tokens)
            self.syntax = opened.syntax
            self.tokenizer = opened.tokenizer
            self._tokens = opened.tokens

    def close(self) -> None:
        if self._is_open():
            self._process.close(self._model)
        self._child = None

    async def prepare(self, prompt: Prompt, constraint: Constraint | None, limit: int) -> Prepared:
        """Tokenize a prompt and make its grammar. Raises BadRequest as `Adapter.prepare`,
        ContextLengthExceeded for far more than `limit` tokens.
        """
        if isinstance(prompt, TokenPrompt) and constraint is None:
            return Prepared(prompt.ids)
        stable = self._process.stable_prompts
        return await self._ask(Prepare(prompt, constraint, limit, stable), Prepared)

    async def tokenize_all(self, texts: list[str], limit: int) -> list[list[int]]:
        """With special tokens added. Raises ContextLengthExceeded likewise."""
        return (await self._ask(Tokenize(texts, limit), Tokenized)).tokens

    async def tokenize_cut(self, texts: list[str], limit: int) -> list[list[int]]:
        """With special tokens added; the ends of texts beyond `limit` tokens are left out."""
        return (await self._ask(TokenizeCut(texts, limit), Tokenized)).tokens

    async def tokenize_pairs(self, first: str, texts: list[str], limit: int) -> Tokenized:
        """`first` with each of `texts`; the ends of both are left out as far as `limit` demands."""
        return await self._ask(TokenizePairs(first, texts, limit), Tokenized)

    async def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """(name, JSON arguments) of the calls in `text`; none if garbled."""
        return (await self._ask(ParseCalls(text, tools), Parsed)).calls

    async def decode(self, tokens: Sequence[int]) -> str:
        return (await self._ask(Decode(list(tokens)), Decoded)).text

    def token_bytes(self, token: int) -> bytes:
        """UTF-8; empty for special and unknown tokens."""
        return self._tokens.token_bytes(token)

    def visible_bytes(self, token: int) -> bytes:
        """`token_bytes`, or the bytes of a special token that marks thinking or a call."""
        marker = self.syntax.visible.get(token)
        return self.token_bytes(token) if marker is None else marker.encode()

    def token_name(self, token: int) -> str:
        return self._tokens.names.get(token) or f"<{token}>"

    def _is_open(self) -> bool:
        return self._child is not None and self._child is self._process.child

    async def _ask(self, question: Question, answer: type[A]) -> A:
        try:
            return await self._ask_once(question, answer)
        except TextProcessEnded:
            # Safe to repeat, unless this very prompt kills the process.
            return await self._ask_once(question, answer)

    async def _ask_once(self, question: Question, answer: type[A]) -> A:
        await self.reopen()
        seconds = self._process.request_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._process.ask(self._model, question, answer)
        except TimeoutError as error:
            # A template can loop for ever, and threads cannot be stopped.
            await self._process.kill()
            raise BadRequest(
                f"Preparing this prompt took longer than {seconds:g} seconds."
            ) from error


def _send(child: Child, request: Request) -> None:
    try:
        child.writer.write(frame(request))
    except (OverflowError, ValueError, TypeError) as error:
        # Integers beyond 64 bits, which JSON permits.
        raise BadRequest(f"The request holds a value out of range: {error}.") from error
    except RecursionError as error:
        raise BadRequest("The request is nested too deeply.") from error


async def _relay_log(stderr: asyncio.StreamReader) -> None:
    while line := await next_line(stderr):
        log.info(event("text_log", line=line.decode(errors="replace").rstrip()))
