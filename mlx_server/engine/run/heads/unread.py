"""What a model has computed of a request, and its head has not read yet."""

import mlx.core as mx

HELD = 128
"""States kept of a request, the last ones; a head passes over those before."""


class Unread:
    """The model's last hidden states of a request, one a token, up to that of token `end` - 1."""

    def __init__(self) -> None:
        self.end = 0
        self._parts: list[mx.array] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def add(self, start: int, states: mx.array) -> None:
        """Keep `states` (tokens, width) of the tokens from `start` on."""
        if start != self.end:
            self._parts, self._count = [], 0
        self._parts.append(states)
        self._count += states.shape[0]
        self.end = start + states.shape[0]
        while (excess := self._count - HELD) > 0:
            first = self._parts[0]
            self._parts[:1] = [first[excess:]] if excess < first.shape[0] else []
            self._count -= min(excess, first.shape[0])

    def take(self, most: int) -> mx.array:
        """(tokens, width): the first ones, up to `most`, which are forgotten."""
        states = mx.concatenate(self._parts)
        self._parts = [states[most:]] if most < self._count else []
        self._count = max(0, self._count - most)
        return states[:most]
