"""The messages between the front and the text process: structs in the engine protocol's frames."""

from typing import Any

import msgspec

from mlx_server.models.adapters.base import Capabilities


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Load the text side of the model folder `path`, to be known as `name`."""

    id: int
    path: str
    name: str
    trust_remote_code: bool


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Forget the text side that was opened as `handle`. Has no answer."""

    handle: int


class Chat(msgspec.Struct, frozen=True, tag="chat"):
    """Render a conversation with the model's template and tokenize it."""

    id: int
    handle: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    continue_final: bool
    limit: int
    """Tokens beyond which the answer may be a refusal instead."""


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Tokenize a bare text."""

    id: int
    handle: int
    text: str
    limit: int


class Decode(msgspec.Struct, frozen=True, tag="decode"):
    """Turn tokens into text, special ones left out."""

    id: int
    handle: int
    tokens: list[int]


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """What the front must know of a text side; its handle is the `id` of the request.

    The bytes of token i are `pieces[offsets[i]:offsets[i + 1]]`, with `offsets` an array of native
    unsigned 32-bit integers; `names` holds the tokens that have no bytes.
    """

    id: int
    family: str
    capabilities: Capabilities
    stop_tokens: list[int]
    offsets: bytes
    pieces: bytes
    names: dict[int, str]


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """The answer to `Chat` and `Text`."""

    id: int
    tokens: list[int]


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    """The answer to `Decode`."""

    id: int
    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A request raised an exception of `errors.py`, which is named by `kind`."""

    id: int
    kind: str
    message: str
    param: str | None
    code: str | None


Request = Open | Close | Chat | Text | Decode
Reply = Opened | Tokens | Decoded | Refused

decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
