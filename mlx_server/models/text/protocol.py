"""The messages between the front and the text process, in the engine protocol's frames."""

import struct
from typing import Any

import msgspec

from mlx_server.models.text.syntax import Syntax
from mlx_server.schemas.internal import Constraint, Prompt

SPAN = struct.Struct("=II")


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Load the text side of the model folder `path`, known to users as `name`."""

    path: str
    name: str
    trust_remote_code: bool


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Forget a text side. Has no answer."""


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Tokenize a prompt and make the grammar of its completion."""

    prompt: Prompt
    constraint: Constraint | None
    limit: int
    """Tokens beyond which the answer may be a refusal."""


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize"):
    """Tokenize whole texts, with all that the tokenizer adds to one."""

    texts: list[str]
    limit: int


class ParseCalls(msgspec.Struct, frozen=True, tag="parse_calls"):
    """Read the tool calls in `text`, which stood between their markers."""

    text: str
    tools: list[dict[str, Any]]


class Decode(msgspec.Struct, frozen=True, tag="decode"):
    """Turn tokens into text, without special ones."""

    tokens: list[int]


class TokenTable(msgspec.Struct, frozen=True):
    """The bytes of every token in running text, and the names of those that have none."""

    data: bytes
    offsets: bytes
    """Native 32-bit integers: token i has `data[offsets[i]:offsets[i + 1]]`."""
    names: dict[int, str]

    def token_bytes(self, token: int) -> bytes:
        """Empty for unknown tokens."""
        position = 4 * token
        if not 0 <= position <= len(self.offsets) - SPAN.size:
            return b""
        start, end = SPAN.unpack_from(self.offsets, position)
        return self.data[start:end]


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """What the front keeps of a text side."""

    stop_tokens: list[int]
    syntax: Syntax
    tokens: TokenTable


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """A prompt's tokens, and what its completion is bound to."""

    tokens: list[int]
    grammar: str | None = None
    """Covers the whole completion, thinking included."""
    thinking: bool = False
    """Whether the prompt leaves a block of thinking open."""


class Tokenized(msgspec.Struct, frozen=True, tag="tokenized"):
    tokens: list[list[int]]


class Parsed(msgspec.Struct, frozen=True, tag="parsed"):
    """Names and arguments (JSON objects) of the calls; none if the text is garbled."""

    calls: list[tuple[str, str]]


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The exception of `errors.py` that a request raised."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None


Question = Open | Prepare | Tokenize | ParseCalls | Decode
Answer = Opened | Prepared | Tokenized | Parsed | Decoded


class Request(msgspec.Struct, frozen=True):
    """A question about the text side that the front calls `model`."""

    id: int
    model: int
    body: Question | Close


class Reply(msgspec.Struct, frozen=True):
    """The answer to the request `id`."""

    id: int
    body: Answer | Refused


decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
