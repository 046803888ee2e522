"""How much a caller may ask for per minute: requests when they come, tokens once they are known."""

from dataclasses import dataclass
from functools import partial
from math import ceil
from time import time
from typing import Self

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from mlx_server.config import Settings
from mlx_server.errors import TooManyRequests
from mlx_server.schemas.internal import Charge

MINUTE = 60
MARGIN = 0.05
"""Seconds added to a wait, for a client's clock and ours."""

RATE_HEADERS = [
    f"x-ratelimit-{figure}-{kind}"
    for kind in ("requests", "tokens")
    for figure in ("limit", "remaining", "reset")
]

HeaderPairs = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Window:
    """What a caller has used of a limit, in a sliding window.

    The window is approximated by this minute's count and a falling share of the last one's:
    https://limits.readthedocs.io/en/stable/strategies.html#sliding-window-counter
    """

    limit: int
    before: int
    """Used in the last minute, of which `left_of_before` seconds are still in the window."""
    left_of_before: float
    now: int
    """Used in this minute, which ends in `left_of_now` seconds."""
    left_of_now: float

    @property
    def remaining(self) -> int:
        used = self.before * self.left_of_before / MINUTE + self.now
        return max(0, self.limit - int(used))

    @property
    def seconds_to_room(self) -> float:
        """When one more fits."""
        if self.remaining:
            return 0.0
        if self.now < self.limit:
            return self.left_of_before - MINUTE * (self.limit - self.now) / self.before + MARGIN
        return self.left_of_now + MINUTE * (1 - self.limit / self.now) + MARGIN

    @property
    def seconds_to_reset(self) -> float:
        """When nothing of what was used counts any more."""
        return self.left_of_now + MINUTE if self.now else self.left_of_before

    def headers(self, kind: str) -> HeaderPairs:
        """What OpenAI's API says of a limit; `kind` is `requests` or `tokens`."""
        figures = {
            "limit": str(self.limit),
            "remaining": str(self.remaining),
            "reset": f"{ceil(self.seconds_to_reset)}s",
        }
        return [(f"x-ratelimit-{name}-{kind}".encode(), v.encode()) for name, v in figures.items()]


class Meter:
    """One limit, and what each caller has used of it."""

    def __init__(self, kind: str, per_minute: int, storage: MemoryStorage) -> None:
        self.kind = kind
        self._item = RateLimitItemPerMinute(per_minute, namespace=kind)
        self._storage = storage
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def take_one(self, caller: str) -> bool:
        """Use one, if there is one left."""
        return await self._limiter.hit(self._item, caller)

    async def charge(self, caller: str, amount: int) -> None:
        """Use `amount`, which may be more than is left: it has been spent already."""
        key = self._item.key_for(caller)
        _, current = self._storage.sliding_window_keys(key, MINUTE, time())
        await self._storage.incr(current, 2 * MINUTE, amount=amount)

    async def window(self, caller: str) -> Window:
        """What `caller` has used."""
        before, left_of_before, now, left_of_now = await self._storage.get_sliding_window(
            self._item.key_for(caller), MINUTE
        )
        # The library counts how long this minute's count matters: through the next one too.
        return Window(self._item.amount, before, left_of_before, now, left_of_now - MINUTE)


class RateLimits:
    """The limits of the settings. Without any, everything is admitted and nothing is counted."""

    def __init__(self, requests: Meter | None, tokens: Meter | None) -> None:
        self._requests = requests
        self._tokens = tokens

    @classmethod
    def of(cls, settings: Settings) -> Self:
        storage = MemoryStorage()

        def meter(kind: str, per_minute: int | None) -> Meter | None:
            return Meter(kind, per_minute, storage) if per_minute else None

        return cls(
            meter("requests", settings.requests_per_minute),
            meter("tokens", settings.tokens_per_minute),
        )

    async def refusal(self, caller: str) -> TooManyRequests | None:
        """Count a request of `caller`, or tell why it must wait."""
        if self._tokens is not None:
            window = await self._tokens.window(caller)
            if not window.remaining:
                return _too_many("tokens", window)
        if self._requests is not None and not await self._requests.take_one(caller):
            return _too_many("requests", await self._requests.window(caller))
        return None

    async def headers(self, caller: str) -> HeaderPairs:
        """What an answer to `caller` says of the limits."""
        meters = [meter for meter in (self._requests, self._tokens) if meter is not None]
        return [
            pair for meter in meters for pair in (await meter.window(caller)).headers(meter.kind)
        ]

    def charge_of(self, caller: str) -> Charge | None:
        """What is to be told of the tokens that a request of `caller` took; None if nothing is."""
        return partial(self._tokens.charge, caller) if self._tokens is not None else None


def _too_many(kind: str, window: Window) -> TooManyRequests:
    return TooManyRequests(
        f"You have used the {window.limit} {kind} that this server allows you per minute.",
        retry_after=window.seconds_to_room,
    )
