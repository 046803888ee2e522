"""What a server and the workers on other machines say to each other, framed as in the engine's
protocol: a 4-byte length, then MessagePack.

A connection is opened by `opening`. Then a worker either joins, and both speak until one goes, or
brings the ticket of a rank or an engine, whose process takes the connection over.
"""

import msgspec

from mlx_server.engine.protocol import Device, Load
from mlx_server.models.hosts.link import Link

VERSION = 1
NONCE_BYTES = 32
MAX_OPENING = 4096
"""Bytes of a frame from somebody who has not shown yet that he knows the secret."""
MAX_FRAME = 16 << 20

Digests = dict[str, str]
"""SHA-256 of a model's files, by their names."""


# opening


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """The server's first frame."""

    version: int
    nonce: bytes


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    nonce: bytes
    proof: bytes


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    proof: bytes


class Denied(msgspec.Struct, frozen=True, tag="denied"):
    reason: str


# worker → server


class Join(msgspec.Struct, frozen=True, tag="join"):
    """`budget`: bytes that models may take there. `addresses`: its own for MLX's ring; if none, the
    one that the server sees.
    """

    name: str
    versions: dict[str, str]
    device: Device
    budget: int
    addresses: list[str]


class Ticket(msgspec.Struct, frozen=True, tag="ticket"):
    """Of the rank, or the engine, that is to have this connection, at its other end too."""

    ticket: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """It cannot be taken. The reason is one line, for people."""

    ticket: str
    reason: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """Its process has; a negative code is a signal."""

    ticket: str
    code: int


class Seen(msgspec.Struct, frozen=True, tag="seen"):
    """What was asked for by that id; None for a model that is not there."""

    id: int
    digests: Digests | None


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    id: int
    port: int


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    id: int
    link: Link


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """What was asked for by that id cannot be done; the reason is for people."""

    id: int
    reason: str


# server → worker


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Which files of a model, by its name or in that folder, are there?"""

    id: int
    model: str
    folder: str


class Listen(msgspec.Struct, frozen=True, tag="listen"):
    """Be one end of a measurement, at that address of yours."""

    id: int
    address: str
    token: bytes


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Be the other end."""

    id: int
    address: str
    port: int
    token: bytes


class Take(msgspec.Struct, frozen=True, tag="take"):
    """Start a rank if `load`, which is what rank 0 loads, has hosts, else an engine. `need`: the
    bytes that it takes.
    """

    ticket: str
    model: str
    digests: Digests
    need: int
    load: Load


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Nobody needs it any more."""

    ticket: str


class Dismissed(msgspec.Struct, frozen=True, tag="dismissed"):
    """The worker need not come again."""

    reason: str


# both


class Alive(msgspec.Struct, frozen=True, tag="alive"): ...


Purpose = Join | Ticket
FromServer = Take | Release | Dismissed | Look | Listen | Measure | Alive
Reply = Seen | Listening | Measured | Unable
FromWorker = Refused | Ended | Reply | Alive

decode_challenge = msgspec.msgpack.Decoder(Challenge).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_verdict = msgspec.msgpack.Decoder(Accepted | Denied).decode
decode_purpose = msgspec.msgpack.Decoder(Purpose).decode
decode_from_server = msgspec.msgpack.Decoder(FromServer).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
