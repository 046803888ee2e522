"""Wired memory: what macOS may not page out, for engines on Metal.

MLX wires every buffer that fits below a limit, when it is made or when the limit is raised. Buffers
that come and go while they are wired have made macOS panic (ml-explore/mlx, issue 3186). So the
limit is raised when nothing but the weights is there, to just their size.
"""

from collections.abc import Iterable

import mlx.core as mx

PAGE = 16 << 10
"""In which macOS gives memory out."""
SMALL_BUFFERS = 1 << 20
"""MLX has the smallest of all in one buffer of this size."""


class Wiring:
    """Wires a model's weights if they take no more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.wired = 0
        """Bytes."""
        self._resting = False
        self._beside = 0

    def hold(self, weights: Iterable[int]) -> None:
        """Wire arrays of these sizes, which are all there is."""
        self._beside = SMALL_BUFFERS + sum(-size % PAGE for size in weights)
        self._wire()

    def rest(self) -> None:
        """Let the system page the weights out, until `wake`. Nothing else may be there then."""
        if self.wired:
            self._unwire()
            self._resting = True

    def wake(self) -> None:
        if self._resting:
            self._resting = False
            self._wire()

    def close(self) -> None:
        if self.wired:
            self._unwire()

    def _wire(self) -> None:
        mx.clear_cache()
        needed = mx.get_active_memory() + self._beside
        if needed <= self.limit:
            mx.set_wired_limit(needed)
            self.wired = needed

    def _unwire(self) -> None:
        mx.synchronize()
        mx.set_wired_limit(0)
        mx.clear_cache()
        self.wired = 0
