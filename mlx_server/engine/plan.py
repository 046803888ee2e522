"""What one turn of an engine computes: `schedule` writes it, `run` carries it out.

Given the same Plans, two runners of one model give the same tokens, so a Plan holds all that was
decided by a clock, by free memory, or by what another thread had finished.
"""

from typing import NamedTuple

import msgspec

from mlx_server.engine.protocol import Failed, Generate


class Start(msgspec.Struct, frozen=True, array_like=True):
    """A request to begin with, or to take up again after it gave its place away.

    `keys` names the whole blocks of its prompt. `reported` says that its first row, with what is
    known of its prompt, has been sent; `cached` is how many prompt tokens came from the prefix
    cache when it first began.
    """

    request: Generate
    keys: list[bytes]
    cached: int | None = None
    reported: bool = False


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """A prefill to begin: one prompt, or several short ones that take a single chunk together.

    With `until`, one prompt is computed up to that token alone, where other requests branch off.
    """

    starts: list[Start]
    until: int | None = None


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """About `tokens` more tokens for the prefill whose first request is `id`."""

    id: int
    tokens: int


class Fetch(msgspec.Struct, frozen=True, array_like=True):
    """Blocks `wanted` of a waiting request's prompt that the disk is to be asked for."""

    id: int
    prompt: list[int]
    keys: list[bytes]
    wanted: list[bytes]


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """One turn, in the order in which its parts are carried out."""

    drop: list[int]
    """Requests that were aborted."""
    preempt: list[int]
    """Requests that give their place in memory away."""
    load: list[int]
    """Requests whose fetched blocks go into the prefix cache."""
    fetch: list[Fetch]
    begin: Begin | None
    prefix_limit: int
    """Bytes that the prefix cache may keep."""
    decode: bool
    chunk: Chunk | None
    mixed: bool
    """Whether decode step and chunk go through the model in one pass."""
    guess: dict[int, int] = {}
    """How many tokens may be guessed for a request, by its id, and verified in a decode step."""
    catch_up: Chunk | None = None
    """Tokens of a request that decodes, for the caches of the draft model."""


class ChunkTime(NamedTuple):
    """What a chunk took; `keys` is how many each of its tokens attended to on average."""

    tokens: int
    keys: float
    seconds: float
    mixed: bool
    behind_step: bool
    """Whether the device had a decode step to finish first."""


class VerifiedTime(NamedTuple):
    """What a pass with guesses took: tokens `taken` by the ids of rows, and how many were computed,
    without those of a `chunk` beside (its tokens, and keys that each attended to).
    """

    taken: dict[int, int]
    tokens: int
    seconds: float
    chunk: tuple[int, float] | None


class DraftTime(NamedTuple):
    """What it took a draft model to draw up to `steps` tokens for so many `rows`."""

    rows: int
    steps: int
    seconds: float


class Outcome:
    """What came of a Plan besides rows: requests that changed hands, and how long things took."""

    def __init__(self) -> None:
        self.failed: list[Failed] = []
        self.returned: list[Start] = []
        """Requests that wait again, in the order in which they are to come next."""
        self.begun = False
        """Whether what was to begin has begun."""
        self.prompts: list[tuple[int, int]] = []
        """Prompt tokens and cached ones of each request that began for the first time."""
        self.joined_empty_batch = False
        self.step_seconds: float | None = None
        self.rows = 0
        """How many rows that step had, or the one that was begun."""
        self.settle_seconds: float | None = None
        """What it took to read a step without beginning another."""
        self.start_seconds: float | None = None
        """What it took to begin a step, where none was under way."""
        self.verified: VerifiedTime | None = None
        self.guessed = self.accepted = 0
        self.drafted: DraftTime | None = None
        self.caught_up: ChunkTime | None = None
        """What a chunk took in the draft model."""
        self.chunk: ChunkTime | None = None

    @property
    def computed(self) -> bool:
        """Whether the device has given a result."""
        results = (self.step_seconds, self.settle_seconds, self.verified, self.chunk)
        return any(one is not None for one in results)
