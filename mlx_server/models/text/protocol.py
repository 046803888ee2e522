"""The messages between the front and the text process: structs in the engine protocol's frames."""

from typing import Any

import msgspec

from mlx_server.models.text.adapters.base import Capabilities, Syntax
from mlx_server.schemas.internal import Constraint, ToolUse


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
    use: ToolUse | None = None
    thinking_budget: int | None = None
    constraint: Constraint | None = None


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Tokenize a bare text."""

    id: int
    handle: int
    text: str
    limit: int
    constraint: Constraint | None = None


class Texts(msgspec.Struct, frozen=True, tag="texts"):
    """Tokenize whole texts, with all that the tokenizer puts around one."""

    id: int
    handle: int
    texts: list[str]
    limit: int


class Constrain(msgspec.Struct, frozen=True, tag="constrain"):
    """Make a grammar for the completion of a prompt that is already tokens."""

    id: int
    handle: int
    constraint: Constraint


class Parse(msgspec.Struct, frozen=True, tag="parse"):
    """Read tool calls out of `text`, which stood between a family's markers for them."""

    id: int
    handle: int
    text: str
    tools: list[dict[str, Any]]


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
    syntax: Syntax
    """How reasoning and tool calls stand in the model's text."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """The answer to `Chat`, `Text` and `Constrain`: a prompt, and what its completion is bound to.

    `grammar` covers the whole completion, thinking included. `thinking` says that the prompt leaves
    a block of thinking open. `forced` says that the completion is, after any thinking, nothing but
    tool calls.
    """

    id: int
    tokens: list[int]
    grammar: str | None = None
    thinking: bool = False
    forced: bool = False


class Tokenized(msgspec.Struct, frozen=True, tag="tokenized"):
    """The answer to `Texts`: the tokens of each."""

    id: int
    tokens: list[list[int]]


class Parsed(msgspec.Struct, frozen=True, tag="parsed"):
    """The answer to `Parse`: names and arguments (JSON objects) of the calls, none if garbled."""

    id: int
    calls: list[tuple[str, str]]


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


Question = Chat | Text | Texts | Constrain | Parse | Decode
"""What is asked of a text side that is open."""
Request = Open | Close | Question
Reply = Opened | Prepared | Tokenized | Parsed | Decoded | Refused

decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
