"""Finds the request that keeps ending engines."""

from collections.abc import Collection

from mlx_server.models.pool.open_requests import OpenRequest

CRASH, KILL, LOSS = 2, 1, 0
"""SIGKILL is weaker evidence: it comes from outside, if perhaps for a request's memory. The loss of
another machine is none.
"""
SUSPICION = 4
"""From here a request runs alone."""
PROOF = 6
"""A third crash or sixth kill."""


class Blame:
    """Counts one engine's ends against its requests; runs suspects alone."""

    def __init__(self) -> None:
        self._on_trial: OpenRequest | None = None

    @property
    def trying(self) -> bool:
        """Whether a request runs alone."""
        return self._on_trial is not None

    def next_to_try(self, suspects: list[OpenRequest]) -> OpenRequest | None:
        """The suspect to run alone now, if none does."""
        if self._on_trial is not None or not suspects:
            return None
        self._on_trial = suspects[0]
        return self._on_trial

    def acquit(self, requests: Collection[OpenRequest]) -> bool:
        """They did no harm or are gone; returns whether a trial ends."""
        if self._on_trial not in requests:
            return False
        self._on_trial = None
        return True

    def engine_ended(self, sent: list[OpenRequest], evidence: int) -> OpenRequest | None:
        """Blame the request on trial, else all that had begun; returns one found guilty."""
        # None had begun: receiving one may have been too much.
        blamed = [request for request in sent if request.begun] or sent
        on_trial, self._on_trial = self._on_trial, None
        if on_trial in blamed:
            blamed = [on_trial]
        for request in blamed:
            request.evidence += evidence
        return on_trial if on_trial in blamed and on_trial.evidence >= PROOF else None
