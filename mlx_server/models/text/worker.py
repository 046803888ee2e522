"""The text process: `python -m mlx_server.models.text.worker FD`.

Reading a tokenizer and rendering a template hold Python's lock, for up to tenths of a second; here
they hold nobody up but each other. Requests run in a few threads, since tokenizing lets go of the
lock. The process ends when the front's end of the socket closes.
"""

import logging
import os
import socket
import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mlx_server.engine.protocol import FrameReader, frame
from mlx_server.engine.spawn import step_back
from mlx_server.errors import ContextLengthExceeded, ServerError
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.generic import import_tokenizers
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.batches import tokenize_all
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
    decode_request,
)
from mlx_server.schemas.internal import ChatPrompt

THREADS = 4
RECEIVE_BYTES = 1 << 18
LONG_TOKEN = 8
"""Characters per token from which on a text is looked at in parts first."""

log = logging.getLogger("mlx_server.text")


class TextWorker:
    """Answers requests about the text sides that were opened."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._adapters: dict[int, Adapter] = {}

    def run(self) -> None:
        """Serve until the front is gone."""
        frames = FrameReader()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="text") as threads:
            while data := self._connection.recv(RECEIVE_BYTES):
                for body in frames.feed(data):
                    request = decode_request(body)
                    if isinstance(request, Close):
                        self._adapters.pop(request.handle, None)
                    else:
                        threads.submit(self._serve, request)
            # Nobody is left to answer; a template that runs on must not keep the process.
            os._exit(0)

    def _serve(self, request: Open | Question) -> None:
        try:
            reply = self._reply(request)
        except ServerError as error:
            kind = type(error).__name__
            reply = Refused(request.id, kind, error.message, error.param, error.code)
        except Exception as error:
            # The front waits for an answer whatever happens; it is a bug, and logged as one.
            log.exception("event=text_request_failed kind=%s", type(request).__name__)
            message = f"Preparing the text failed: {type(error).__name__}"
            reply = Refused(request.id, ServerError.__name__, message, None, None)
        with self._sending:
            self._connection.sendall(frame(reply))

    def _reply(self, request: Request) -> Reply:
        match request:
            case Open():
                return self._open(request)
            case Chat():
                return self._chat(request)
            case Text():
                return self._text(request)
            case Constrain():
                grammar = self._adapters[request.handle].bind(request.constraint)
                return Prepared(request.id, [], grammar)
            case Parse():
                calls = self._adapters[request.handle].parse_calls(request.text, request.tools)
                return Parsed(request.id, calls)
            case Texts():
                return Tokenized(request.id, self._tokenize_all(request))
            case Decode():
                return Decoded(request.id, self._adapters[request.handle].decode(request.tokens))
            case _:
                raise TypeError(f"{type(request).__name__} has no answer")

    def _open(self, request: Open) -> Opened:
        adapter = load_adapter(Path(request.path), request.name, request.trust_remote_code)
        self._adapters[request.id] = adapter
        size = adapter.tokenizer.get_vocab_size(with_added_tokens=True)
        pieces = [adapter.token_bytes(token) for token in range(size)]
        offsets = array("I", [0])
        for piece in pieces:
            offsets.append(offsets[-1] + len(piece))
        return Opened(
            id=request.id,
            family=adapter.family,
            capabilities=adapter.capabilities,
            stop_tokens=sorted(adapter.stop_tokens),
            offsets=offsets.tobytes(),
            pieces=b"".join(pieces),
            names={t: adapter.token_name(t) for t, piece in enumerate(pieces) if not piece},
            syntax=adapter.syntax,
        )

    def _text(self, request: Text) -> Prepared:
        adapter = self._adapters[request.handle]
        _check_length(adapter, request.text, request.limit, "prompt")
        grammar = adapter.bind(request.constraint) if request.constraint else None
        return Prepared(request.id, adapter.encode(request.text), grammar)

    def _chat(self, request: Chat) -> Prepared:
        adapter = self._adapters[request.handle]
        contents = (message.get("content") for message in request.messages)
        longest = max((text for text in contents if isinstance(text, str)), key=len, default="")
        _check_length(adapter, longest, request.limit, "messages")
        prompt = ChatPrompt(
            messages=request.messages,
            tools=request.tools,
            template_kwargs=request.template_kwargs,
            continue_final=request.continue_final,
            use=request.use,
            thinking_budget=request.thinking_budget,
        )
        chat = adapter.prepare(prompt, request.constraint)
        return Prepared(request.id, chat.tokens, chat.grammar, chat.thinking, chat.forced)

    def _tokenize_all(self, request: Texts) -> list[list[int]]:
        adapter = self._adapters[request.handle]
        check = partial(_check_length, adapter, limit=request.limit, param="input")
        return tokenize_all(adapter, request.texts, check)


def _check_length(adapter: Adapter, text: str, limit: int, param: str) -> None:
    """Refuse a text far beyond the context before the time it takes to tokenize all of it."""
    if len(text) > limit * LONG_TOKEN and adapter.surely_exceeds(text, limit):
        raise ContextLengthExceeded(
            f"This model's context holds {limit} tokens; your text of {len(text)} characters "
            "has more.",
            param=param,
        )


def main() -> None:
    """Entry of the text process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    step_back()
    connection = socket.socket(fileno=int(sys.argv[1]))
    # By the main thread: MLX keeps state in the thread that imports it.
    import_tokenizers()
    TextWorker(connection).run()


if __name__ == "__main__":
    main()
