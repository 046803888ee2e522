"""How much of its KV memory an engine uses after it has run out of memory."""

import time

LEAST_SHARE = 1 / 16
LOWERED = 0.5
RAISED = 1.5
RAISE_SECONDS = 60.0
"""How long all must have gone well for the share to grow again."""


class KvBackoff:
    """A share of the KV limit: halved at every failure, raised by half after each good minute."""

    def __init__(self, share: float) -> None:
        self._share = max(LEAST_SHARE, min(1.0, share))
        self._changed = time.monotonic()

    @property
    def share(self) -> float:
        while self._share < 1.0 and time.monotonic() >= self._changed + RAISE_SECONDS:
            self._share = min(1.0, self._share * RAISED)
            self._changed += RAISE_SECONDS
        return self._share

    def lower(self) -> None:
        self._share = max(LEAST_SHARE, self.share * LOWERED)
        self._changed = time.monotonic()
