"""Messages between the front and the text process, framed as the engine's."""

import struct
from typing import Any

import msgspec

from mlx_server.models.text.syntax import Syntax, Thinking
from mlx_server.schemas.internal import Constraint, Prompt

SPAN = struct.Struct("=II")


class Open(msgspec.Struct, frozen=True, tag="open"):
    """`name` is what users call the model in folder `path`."""

    path: str
    name: str
    trust_remote_code: bool


class Close(msgspec.Struct, frozen=True, tag="close"): ...


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    prompt: Prompt
    constraint: Constraint | None
    limit: int
    """In tokens; more may be refused."""
    stable: bool = False
    """What changes with every request is taken out of the way."""


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize"):
    """With special tokens added."""

    texts: list[str]
    limit: int


class TokenizeCut(msgspec.Struct, frozen=True, tag="tokenize_cut"):
    """With special tokens added, and no more than `limit` in all."""

    texts: list[str]
    limit: int


class TokenizePairs(msgspec.Struct, frozen=True, tag="tokenize_pairs"):
    """`first` with each of `texts`, with special tokens added, and no more than `limit` in all."""

    first: str
    texts: list[str]
    limit: int


class ParseCalls(msgspec.Struct, frozen=True, tag="parse_calls"):
    text: str
    tools: list[dict[str, Any]]


class Decode(msgspec.Struct, frozen=True, tag="decode"):
    tokens: list[int]


class TokenTable(msgspec.Struct, frozen=True):
    """The bytes of all tokens, and names of tokens without bytes."""

    data: bytes
    offsets: bytes
    """Native 32-bit: token i is `data[offsets[i]:offsets[i + 1]]`."""
    names: dict[int, str]

    def token_bytes(self, token: int) -> bytes:
        position = 4 * token
        if not 0 <= position <= len(self.offsets) - SPAN.size:
            return b""
        start, end = SPAN.unpack_from(self.offsets, position)
        return self.data[start:end]


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    stop_tokens: list[int]
    syntax: Syntax
    tokens: TokenTable
    tokenizer: bytes | None = None
    """As tokenizer.json, for grammars, where the folder has none that serves."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    tokens: list[int]
    grammar: str | None = None
    """Of the whole completion, thinking included."""
    thinking: Thinking = Thinking.DONE


class Tokenized(msgspec.Struct, frozen=True, tag="tokenized"):
    tokens: list[list[int]]
    seconds: list[int] = []
    """Of pairs: where in each the second text begins, by the tokens' types."""


class Parsed(msgspec.Struct, frozen=True, tag="parsed"):
    """(name, JSON arguments); none if garbled."""

    calls: list[tuple[str, str]]


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """`kind` names an exception of `errors.py`."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None


Question = Open | Prepare | Tokenize | TokenizeCut | TokenizePairs | ParseCalls | Decode
Answer = Opened | Prepared | Tokenized | Parsed | Decoded


class Request(msgspec.Struct, frozen=True):
    """`model` is the front's number for a text side."""

    id: int
    model: int
    body: Question | Close


class Reply(msgspec.Struct, frozen=True):
    id: int
    body: Answer | Refused


decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
