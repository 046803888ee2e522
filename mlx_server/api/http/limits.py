"""Rate limits: requests counted on arrival, tokens once known."""

from dataclasses import dataclass
from functools import partial
from time import time

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from mlx_server.errors import TooManyRequests
from mlx_server.schemas.internal import Charge

MINUTE = 60
MARGIN = 0.05
"""Seconds added to a wait, since clocks differ."""


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window approximated by two counts:
    https://limits.readthedocs.io/en/stable/strategies.html#sliding-window-counter
    """

    limit: int
    before: int
    """Used last minute; `left_of_before` seconds of it remain in the window."""
    left_of_before: float
    now: int
    """Used this minute, which ends in `left_of_now` seconds."""
    left_of_now: float

    @property
    def remaining(self) -> int:
        used = self.before * self.left_of_before / MINUTE + self.now
        return max(0, self.limit - int(used))

    @property
    def seconds_to_room(self) -> float:
        if self.remaining:
            return 0.0
        if self.now < self.limit:
            return self.left_of_before - MINUTE * (self.limit - self.now) / self.before + MARGIN
        return self.left_of_now + MINUTE * (1 - self.limit / self.now) + MARGIN

    @property
    def seconds_to_reset(self) -> float:
        return self.left_of_now + MINUTE if self.now else self.left_of_before


class Meter:
    def __init__(self, kind: str, per_minute: int, storage: MemoryStorage) -> None:
        self.kind = kind
        self._item = RateLimitItemPerMinute(per_minute, namespace=kind)
        self._storage = storage
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def take_one(self, caller: str) -> bool:
        return await self._limiter.hit(self._item, caller)

    async def charge(self, caller: str, amount: int) -> None:
        """`amount` may exceed what is left: it is already spent."""
        key = self._item.key_for(caller)
        _, current = self._storage.sliding_window_keys(key, MINUTE, time())
        await self._storage.incr(current, 2 * MINUTE, amount=amount)

    async def window(self, caller: str) -> Window:
        before, left_of_before, now, left_of_now = await self._storage.get_sliding_window(
            self._item.key_for(caller), MINUTE
        )
        # The library reports when this minute's count expires: the end of the next minute.
        return Window(self._item.amount, before, left_of_before, now, left_of_now - MINUTE)


class RateLimits:
    """Per minute and caller; None means unlimited."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        storage = MemoryStorage()
        self._requests = _meter("requests", requests_per_minute, storage)
        self._tokens = _meter("tokens", tokens_per_minute, storage)

    async def refusal(self, caller: str) -> TooManyRequests | None:
        """Count a request, or return why it must wait."""
        if self._tokens is not None:
            window = await self._tokens.window(caller)
            if not window.remaining:
                return _too_many("tokens", window)
        if self._requests is not None and not await self._requests.take_one(caller):
            return _too_many("requests", await self._requests.window(caller))
        return None

    async def windows(self, caller: str) -> dict[str, Window]:
        meters = [meter for meter in (self._requests, self._tokens) if meter is not None]
        return {meter.kind: await meter.window(caller) for meter in meters}

    def charge_of(self, caller: str) -> Charge | None:
        """None without a token limit."""
        return partial(self._tokens.charge, caller) if self._tokens is not None else None


def _meter(kind: str, per_minute: int | None, storage: MemoryStorage) -> Meter | None:
    return Meter(kind, per_minute, storage) if per_minute else None


def _too_many(kind: str, window: Window) -> TooManyRequests:
    return TooManyRequests(
        f"You have used the {window.limit} {kind} that this server allows you per minute.",
        retry_after=window.seconds_to_room,
    )
