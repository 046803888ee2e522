"""Streams tokens to text, with log-probabilities in step. `push` runs once per token."""

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from mlx_server.engine.protocol import Logprobs
from mlx_server.schemas.internal import Alternative, TokenLogprob
from mlx_server.services.output.stops import StopMatcher


class Vocabulary(Protocol):
    def token_bytes(self, token: int) -> bytes: ...

    def token_name(self, token: int) -> str: ...


class TruncatedText:
    """Text up to the first stop string, and its tokens' log-probabilities. An entry is released
    with the last character of its token, so released `bytes` join to the text; a token that the end
    divides is not released.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._matcher = StopMatcher(stops)
        self._emitted = 0
        self._pending: deque[tuple[int, TokenLogprob]] = deque()

    @property
    def stop(self) -> str | None:
        """The stop string that ended it."""
        return self._matcher.found

    def add_entry(self, end: int, entry: TokenLogprob) -> None:
        self._pending.append((end, entry))

    def add(self, text: str) -> tuple[str, tuple[TokenLogprob, ...]]:
        text, self.stopped = self._matcher.push(text)
        self._emitted += len(text)
        return text, self._release() if self._pending else ()

    def flush(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What was held back; stop strings do not span a flush."""
        text = self._matcher.flush()
        self._emitted += len(text)
        if not self._pending:
            return text, ()
        entries = tuple(entry for _, entry in self._pending)
        self._pending.clear()
        return text, entries

    def _release(self) -> tuple[TokenLogprob, ...]:
        pending, emitted = self._pending, self._emitted
        released = []
        if self.stopped:
            released = [entry for _, entry in pending if entry.offset < emitted]
            pending.clear()
        while pending and pending[0][0] <= emitted:
            released.append(pending.popleft()[1])
        return tuple(released)


class AlignedText(TruncatedText):
    """The truncated text of tokens. Drops an incomplete last character, but not its tokens'
    entries.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()) -> None:
        super().__init__(stops)
        self._vocabulary = vocabulary
        self._decoder = TokenDecoder(vocabulary.token_bytes)
        self._decoded = 0

    def push(
        self, token: int, logprobs: Logprobs | None = None
    ) -> tuple[str, tuple[TokenLogprob, ...]]:
        if self.stopped:
            return "", ()
        offset = self._decoded
        text = self._decoder.push(token)
        self._decoded += len(text)
        if logprobs is not None:
            end = self._decoded + self._decoder.inside_character
            self.add_entry(end, token_logprob(self._vocabulary, logprobs, offset))
        # `add`, inlined: runs once per token.
        text, self.stopped = self._matcher.push(text)
        self._emitted += len(text)
        return text, self._release() if self._pending else ()


class TokenDecoder:
    """Returns complete characters, U+FFFD for invalid bytes; holds back at most three bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._pending = b""

    @property
    def inside_character(self) -> bool:
        return bool(self._pending)

    def push(self, token: int) -> str:
        data = self._pending + self._token_bytes(token)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text


def token_logprob(vocabulary: Vocabulary, logprobs: Logprobs, offset: int) -> TokenLogprob:
    return TokenLogprob(
        token=token_text(vocabulary, logprobs.token),
        bytes=vocabulary.token_bytes(logprobs.token),
        logprob=logprobs.logprob,
        top=tuple(
            Alternative(token_text(vocabulary, token), vocabulary.token_bytes(token), logprob)
            for token, logprob in logprobs.top
        ),
        offset=offset,
    )


def prompt_logprobs(
    vocabulary: Vocabulary,
    tokens: Sequence[int],
    logprobs: Sequence[Logprobs | None],
    decoded: str,
) -> tuple[TokenLogprob, ...]:
    decoder = TokenDecoder(vocabulary.token_bytes)
    entries, text = [], ""
    for token, known in zip(tokens, logprobs, strict=True):
        entry = token_logprob(vocabulary, known or Logprobs(token, 0.0, []), len(text))
        entries.append(entry if known else replace(entry, logprob=None))
        text += decoder.push(token)
    if text.startswith(" ") and decoded == text[1:]:
        return _without_leading_space(entries)
    return tuple(entries)


def _without_leading_space(entries: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """SentencePiece adds a space before a text and removes it in decoding."""
    shifted = [replace(entry, offset=max(0, entry.offset - 1)) for entry in entries]
    first = next(i for i, entry in enumerate(entries) if entry.bytes)
    entry = shifted[first]
    shifted[first] = replace(entry, token=entry.token[1:], bytes=entry.bytes[1:])
    return tuple(shifted)


def token_text(vocabulary: Vocabulary, token: int) -> str:
    """Readable: text, a special token's name, or `bytes:` and codes."""
    data = vocabulary.token_bytes(token)
    if not data:
        return vocabulary.token_name(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data)
