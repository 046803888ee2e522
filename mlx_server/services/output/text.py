"""From tokens to text as it streams: whole characters, stop strings, log-probabilities in step.

Everything here belongs to one choice of one request and runs once per token.
"""

import codecs
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from mlx_server.engine.protocol import Logprobs
from mlx_server.schemas.internal import Alternative, TokenLogprob


class TokenTexts(Protocol):
    """What single tokens stand for in a model's vocabulary."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token in running text; empty for special tokens."""

    def token_name(self, token: int) -> str:
        """What the vocabulary calls a token that has no bytes."""


class CutText:
    """A text that ends before the first stop string, and the entries of the tokens that make it.

    An entry is released with the last character that its token contributes to, so that the
    `bytes` of the entries released so far join to the text emitted so far. Entries of tokens
    behind the cut are dropped; one whose token the cut divides stays.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string has come; nothing follows then."""
        self._matcher = StopMatcher(stops)
        self._emitted = 0
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()

    def expect(self, end: int, entry: TokenLogprob) -> None:
        """Take the entry of a token whose text ends `end` characters from the beginning."""
        self._waiting.append((end, entry))

    def add(self, text: str) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Take more text. Returns what it makes certain."""
        text, self.stopped = self._matcher.push(text)
        self._emitted += len(text)
        return text, self._release() if self._waiting else ()

    def finish(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What was held back in case a stop string came; one in what is added later begins anew."""
        text = self._matcher.flush()
        self._emitted += len(text)
        entries = tuple(entry for _, entry in self._waiting)
        self._waiting.clear()
        return text, entries

    def _release(self) -> tuple[TokenLogprob, ...]:
        waiting, emitted = self._waiting, self._emitted
        released = []
        if self.stopped:
            released = [entry for _, entry in waiting if entry.offset < emitted]
            waiting.clear()
        while waiting and waiting[0][0] <= emitted:
            released.append(waiting.popleft()[1])
        return tuple(released)


class AlignedText(CutText):
    """The same of all tokens of a choice.

    Bytes that began a character at the end are dropped, the entries of their tokens are not.
    """

    def __init__(self, texts: TokenTexts, stops: Sequence[str] = ()) -> None:
        super().__init__(stops)
        self._texts = texts
        self._decoder = TokenDecoder(texts.token_bytes)
        self._decoded = 0

    def push(
        self, token: int, logprobs: Logprobs | None = None
    ) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Take the next token. Returns what it makes certain."""
        if self.stopped:
            return "", ()
        offset = self._decoded
        text = self._decoder.push(token)
        self._decoded += len(text)
        if logprobs is not None:
            end = self._decoded + self._decoder.inside_character
            self.expect(end, token_logprob(self._texts, logprobs, offset))
        # As `add` does, without a call for each token.
        text, self.stopped = self._matcher.push(text)
        self._emitted += len(text)
        return text, self._release() if self._waiting else ()


class TokenDecoder:
    """Joins the bytes of tokens and gives out whole characters, each as soon as it is whole.

    Holds back three bytes at most. What cannot become a character is shown as U+FFFD at once;
    a character still incomplete at the end is never shown.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._pending = b""

    @property
    def inside_character(self) -> bool:
        """Whether the tokens so far end in the middle of a character."""
        return bool(self._pending)

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        data = self._pending + self._token_bytes(token)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, and lets pass what precedes it.

    The match that ends first wins, and of those that end together the longest. Held back is the
    longest end of the text that begins a stop string, no more. An Aho–Corasick automaton: its
    states are the beginnings of the stop strings, the current one is that longest end.
    (Aho and Corasick, "Efficient string matching", CACM 18(6), 1975.)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._match = [0]
        for stop in filter(None, stops):
            self._add(stop)
        self._link()
        self._first = re.compile("|".join(map(re.escape, self._next[0]))) if self._next[0] else None
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What of the text can be shown, and whether a stop string has come, which ends it."""
        if self._first is None:
            return text, False
        state, position = self._state, 0
        if state == 0:
            found = self._first.search(text)
            if found is None:
                return text, False
            position = found.start()
        for end in range(position, len(text)):
            state = self._step(state, text[end])
            if self._match[state]:
                whole = self._held + text[: end + 1]
                self._state, self._held = 0, ""
                return whole[: len(whole) - self._match[state]], True
        whole = self._held + text
        sure = len(whole) - self._depth[state]
        self._state, self._held = state, whole[sure:]
        return whole[:sure], False

    def flush(self) -> str:
        """What is held back; call when the text ends without a stop string."""
        held = self._held
        self._state, self._held = 0, ""
        return held

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(depth)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Give each state, nearest first, the longest shorter state that its text ends in."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                fallback = self._step(self._fallback[state], character)
                self._fallback[child] = fallback
                # The longest of the stop strings that end here is the one that starts first.
                self._match[child] = self._match[child] or self._match[fallback]
                queue.append(child)


def token_logprob(texts: TokenTexts, logprobs: Logprobs, offset: int) -> TokenLogprob:
    """What an engine says of one position, in words: token texts and bytes for ids."""
    return TokenLogprob(
        token=token_text(texts, logprobs.token),
        bytes=texts.token_bytes(logprobs.token),
        logprob=logprobs.logprob,
        top=tuple(
            Alternative(token_text(texts, token), texts.token_bytes(token), logprob)
            for token, logprob in logprobs.top
        ),
        offset=offset,
    )


def prompt_logprobs(
    texts: TokenTexts, tokens: Sequence[int], logprobs: Sequence[Logprobs | None], decoded: str
) -> tuple[TokenLogprob, ...]:
    """The entries of a prompt's tokens, with offsets into `decoded`, their text."""
    decoder = TokenDecoder(texts.token_bytes)
    entries, text = [], ""
    for token, known in zip(tokens, logprobs, strict=True):
        given = known or Logprobs(token, 0.0, [])
        entry = token_logprob(texts, given, len(text))
        entries.append(entry if known else replace(entry, logprob=None))
        text += decoder.push(token)
    if text.startswith(" ") and decoded == text[1:]:
        return _without_leading_space(entries)
    return tuple(entries)


def _without_leading_space(entries: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """For SentencePiece, which puts a space in front of a text and takes it away in decoding."""
    shifted = [replace(entry, offset=max(0, entry.offset - 1)) for entry in entries]
    first = next(i for i, entry in enumerate(entries) if entry.bytes)
    entry = shifted[first]
    shifted[first] = replace(entry, token=entry.token[1:], bytes=entry.bytes[1:])
    return tuple(shifted)


def token_text(texts: TokenTexts, token: int) -> str:
    """How to show a token by itself: its text, a special one's name, or bytes of a character."""
    data = texts.token_bytes(token)
    if not data:
        return texts.token_name(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data)
