"""What rank 0 and the other ranks of a model say to each other, framed as in `protocol`."""

import msgspec

from mlx_server.engine.plan import Plan
from mlx_server.engine.protocol import Fabric, Load, Memory

Addresses = list[str]
"""Where a rank listens, each as `address:port`; it has as many links to each neighbour."""


class CacheCost(msgspec.Struct, frozen=True):
    """Bytes of a sequence's caches in a rank: whatever its length; and by layer for each token, of
    which only so many are kept, or all.
    """

    fixed: int
    growing: list[tuple[int, int | None]]


# rank 0 → the others


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The first frame: get ready for this model."""

    rank: int
    load: Load


class Join(msgspec.Struct, frozen=True, tag="join"):
    """All are ready: join the ring, and load."""

    ranks: list[Addresses]
    fabric: Fabric | None = None


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """All have loaded, and this is what they have in common: tokens of the longest sequence, and
    bytes of the prefix cache. Where they have other layers, its blocks and snapshots count for so
    many bytes in all of them.
    """

    longest_sequence: int
    prefix_limit: int
    block_bytes: int = 0
    snapshot_bytes: int = 0


class Turn(msgspec.Struct, frozen=True, tag="turn"):
    plan: Plan


class Rest(msgspec.Struct, frozen=True, tag="rest"):
    """Nothing runs: let go of what outlives a step."""

    prefix_limit: int


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Empty the prefix cache."""


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Let the system page the weights out until the next turn."""


class Guesses(msgspec.Struct, frozen=True, tag="guesses"):
    """What is guessed in this turn's pass, by the ids of requests."""

    tokens: dict[int, list[int]]


class Problems(msgspec.Struct, frozen=True, tag="problems"):
    """Which places of a step with grammars cannot go on."""

    places: list[int]


class Stop(msgspec.Struct, frozen=True, tag="stop"): ...


# the others → rank 0


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """All that comes before the weights is done. `addresses`: free ones, where ranks are on several
    machines.
    """

    pid: int
    addresses: Addresses = []


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """`left`: bytes that the weights leave of the memory limit."""

    left: int
    cost: CacheCost


class Using(msgspec.Struct, frozen=True, tag="using"):
    memory: Memory


class Failing(msgspec.Struct, frozen=True, tag="failing"):
    """The rank ends after this frame. `message` is for users if it is the model's fault."""

    message: str


Command = Begin | Join | Settled | Turn | Rest | Forget | Sleep | Stop
ToRank = Command | Guesses | Problems
FromRank = Prepared | Loaded | Using | Failing

decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
