"""The text process: `python -m mlx_server.models.text.worker FD`.

Reading tokenizers and rendering templates hold the GIL for tenths of a second, which here delays no
event loop. Tokenizing releases it, hence some threads.
"""

import logging
import os
import select
import socket
import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_server.engine.protocol import FrameReader, frame
from mlx_server.engine.spawn import give_way, leave_group
from mlx_server.errors import ServerError
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.conversations.volatile import settled
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
    Refused,
    Reply,
    Request,
    Tokenize,
    TokenizeCut,
    Tokenized,
    TokenizePairs,
    TokenTable,
    decode_request,
)
from mlx_server.models.text.tokenizer import TextTokenizer, import_tokenizers, is_stored
from mlx_server.schemas.internal import ChatPrompt, Prompt, TextPrompt
from mlx_server.starting import for_good

THREADS = 4
RECEIVE_BYTES = 1 << 18
PREPARE_SECONDS = 1.0
"""Without a question, after which the process gets ready for grammars."""

log = logging.getLogger("mlx_server.text")


class TextWorker:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._adapters: dict[int, Adapter] = {}
        self._unprepared: list[Adapter] = []

    def run(self) -> None:
        frames = FrameReader()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="text") as threads:
            while data := self._receive():
                for body in frames.feed(data):
                    request = decode_request(body)
                    if isinstance(request.body, Close):
                        self._adapters.pop(request.model, None)
                    else:
                        threads.submit(self._serve, request)
            # A looping template must not keep the process alive.
            os._exit(0)

    def _receive(self) -> bytes:
        if not select.select([self._connection], [], [], PREPARE_SECONDS)[0]:
            self._prepare()
        return self._connection.recv(RECEIVE_BYTES)

    def _prepare(self) -> None:
        """Get ready for grammars, which holds Python's lock, while nobody waits."""
        while self._unprepared:
            adapter = self._unprepared.pop()
            if adapter in self._adapters.values():
                adapter.prepare_grammars()
            if select.select([self._connection], [], [], 0)[0]:
                return

    def _serve(self, request: Request) -> None:
        body: Answer | Refused
        try:
            body = self._answer(request)
        except ServerError as error:
            body = Refused(type(error).__name__, error.message, error.param, error.code)
        except BaseException as error:
            # The front awaits an answer to everything; a panic in Rust is no Exception.
            log.exception("event=text_request_failed kind=%s", type(request.body).__name__)
            message = f"Preparing the text failed: {type(error).__name__}"
            body = Refused(ServerError.__name__, message)
        with self._sending:
            self._connection.sendall(frame(Reply(request.id, body)))

    def _answer(self, request: Request) -> Answer:
        question = request.body
        if isinstance(question, Open):
            return self._open(request.model, question)
        adapter = self._adapters[request.model]
        match question:
            case Prepare(prompt=prompt, constraint=constraint, limit=limit):
                _check_length(adapter.tokenizer, prompt, limit)
                if question.stable and isinstance(prompt, ChatPrompt):
                    prompt = settled(prompt)
                return adapter.prepare(prompt, constraint)
            case Tokenize(texts=texts, limit=limit):
                return Tokenized(adapter.tokenizer.encode_complete(texts, limit))
            case TokenizeCut(texts=texts, limit=limit):
                return Tokenized(adapter.tokenizer.encode_cut(texts, limit))
            case TokenizePairs(first=first, texts=texts, limit=limit):
                pairs = adapter.tokenizer.encode_pairs(first, texts, limit)
                return Tokenized([ids for ids, _ in pairs], [second for _, second in pairs])
            case ParseCalls(text=text, tools=tools):
                return Parsed(adapter.parse_calls(text, tools))
            case Decode(tokens=tokens):
                return Decoded(adapter.tokenizer.decode(tokens))
            case _:
                raise TypeError(f"{type(question).__name__} has no answer")

    def _open(self, model: int, question: Open) -> Opened:
        path = Path(question.path)
        adapter = load_adapter(path, question.name, question.trust_remote_code)
        self._adapters[model] = adapter
        self._unprepared.append(adapter)
        backend = adapter.tokenizer.backend
        return Opened(
            stop_tokens=sorted(adapter.stop_tokens),
            syntax=adapter.syntax,
            tokens=token_table(adapter.tokenizer),
            tokenizer=None if is_stored(backend, path) else backend.to_str().encode(),
        )


def token_table(tokenizer: TextTokenizer) -> TokenTable:
    data, offsets, names = bytearray(), array("I", [0]), {}
    for token in range(tokenizer.size):
        known = tokenizer.token_bytes(token)
        data += known
        offsets.append(len(data))
        if not known:
            names[token] = tokenizer.token_name(token)
    return TokenTable(bytes(data), offsets.tobytes(), names)


def _check_length(tokenizer: TextTokenizer, prompt: Prompt, limit: int) -> None:
    if isinstance(prompt, TextPrompt):
        tokenizer.check_length(prompt.text, limit, "prompt")
    if isinstance(prompt, ChatPrompt):
        contents = (message.get("content") for message in prompt.messages)
        longest = max((text for text in contents if isinstance(text, str)), key=len, default="")
        tokenizer.check_length(longest, limit, "messages")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    leave_group()
    give_way()
    connection = socket.socket(fileno=int(sys.argv[1]))
    with for_good():
        # In the main thread: MLX keeps state in the importing thread.
        import_tokenizers()
    TextWorker(connection).run()


if __name__ == "__main__":
    main()
