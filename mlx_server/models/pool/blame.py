"""Finds the request that keeps ending engines."""

from collections.abc import Collection

from mlx_server.models.pool.open_requests import OpenRequest

CRASH, KILL = 2, 1
"""Evidence of an engine's end. SIGKILL comes from outside, but perhaps for a request's memory."""
SUSPICION = 4
"""Evidence from which a request runs alone."""
PROOF = 6
"""Evidence that convicts a request that ran alone: a third crash, or a sixth kill."""


class Blame:
    """Counts the ends of engines against what they worked on, and tries suspects alone."""

    def __init__(self) -> None:
        self._on_trial: OpenRequest | None = None

    def next_to_run(self, waiting: list[OpenRequest]) -> list[OpenRequest]:
        """Suspects first and one at a time, then all others together."""
        if self._on_trial is not None:
            return []
        self._on_trial = next((r for r in waiting if r.evidence >= SUSPICION), None)
        return waiting if self._on_trial is None else [self._on_trial]

    def acquit(self, requests: Collection[OpenRequest]) -> bool:
        """These did no harm or are gone; returns whether that ends a trial."""
        if self._on_trial not in requests:
            return False
        self._on_trial = None
        return True

    def engine_ended(self, sent: list[OpenRequest], evidence: int) -> OpenRequest | None:
        """Blame the request on trial, or else all that had begun; returns one that is convicted."""
        # If none had begun, receiving a request may have been too much for the engine.
        blamed = [request for request in sent if request.begun] or sent
        on_trial, self._on_trial = self._on_trial, None
        if on_trial in blamed:
            blamed = [on_trial]
        for request in blamed:
            request.evidence += evidence
        return on_trial if on_trial in blamed and on_trial.evidence >= PROOF else None
