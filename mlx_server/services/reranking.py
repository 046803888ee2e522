"""Ranks texts by how well they answer a query."""

import asyncio
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from mlx_server.services.embeddings import EmbeddingRequest, EmbeddingService
from mlx_server.telemetry.watch import Watch

FLOAT32_BYTES = 4
COMPARED_AT_ONCE = 16
"""Vectors, between which the event loop runs."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """`scores` in the order of the texts: 0 to 1 of a model that judges pairs, else the cosine of
    the vectors.
    """

    model: str
    scores: list[float]
    tokens: int

    def best(self, count: int | None) -> list[tuple[int, float]]:
        """(index, score), the best first."""
        ranked = sorted(enumerate(self.scores), key=lambda pair: pair[1], reverse=True)
        return ranked[:count]


async def rank(service: EmbeddingService, request: EmbeddingRequest, watch: Watch) -> Ranking:
    """`request` has a query. Raises as `EmbeddingService.open`."""
    async with service.open(request, watch) as vectors:
        numbers: list[tuple[float, ...]] = [()] * vectors.count
        async for together in vectors.arrivals():
            for index, data in together:
                numbers[index] = struct.unpack(f"<{len(data) // FLOAT32_BYTES}f", data)
        if vectors.scores:
            scores = [_sigmoid(number) for [number] in numbers]
        else:
            scores = await _cosines(numbers[0], numbers[1:])
        return Ranking(vectors.model, scores, vectors.prompt_tokens)


async def _cosines(query: Sequence[float], texts: Sequence[Sequence[float]]) -> list[float]:
    cosines: list[float] = []
    for start in range(0, len(texts), COMPARED_AT_ONCE):
        batch = texts[start : start + COMPARED_AT_ONCE]
        cosines += [_cosine(query, text) for text in batch]
        await asyncio.sleep(0)
    return cosines


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return math.fsum(map(mul, one, other)) / lengths if lengths else 0.0


def _sigmoid(number: float) -> float:
    """Without an overflow at either end."""
    return 0.5 * (1 + math.tanh(number / 2))
