"""`python -m benchmarks.idle_neighbour FOLDER`: one model's speed beside another that is idle.

Rounds with and without the neighbour loaded alternate, so that what else the machine does falls on
both alike. Prints tokens per second and the median of the rounds' ratios.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling
from mlx_server.models.pool.resumable import ResumableEngine

PROMPT = list(range(5, 37))
OPTIONS = LoadOptions(memory_limit="30%")


async def measure(engine: EngineClient, batch: int, tokens: int) -> float:
    """Tokens per second of `batch` requests together."""
    requests = [Generate(0, PROMPT, Sampling(seed=i), tokens) for i in range(batch)]
    resumable = ResumableEngine(engine.model_id)
    resumable.replicas[0].attach(engine)
    started = time.perf_counter()
    with resumable.generate(requests, "benchmark") as stream:
        async for _ in stream.rows():
            pass
    return batch * tokens / (time.perf_counter() - started)


async def measure_both(engine: EngineClient, path: Path, batch: int, tokens: int) -> list[float]:
    """Tokens per second alone, and beside an idle neighbour."""
    alone = await measure(engine, batch, tokens)
    neighbour = await EngineClient.start("neighbour", path, OPTIONS)
    try:
        await measure(neighbour, 1, 4)
        beside = await measure(engine, batch, tokens)
    finally:
        await neighbour.stop()
    return [alone, beside]


async def run(path: Path, rounds: int, batch: int, tokens: int) -> None:
    """Measure and print."""
    engine = await EngineClient.start("measured", path, OPTIONS)
    ratios = []
    try:
        await measure(engine, batch, tokens)
        for number in range(rounds):
            alone, beside = await measure_both(engine, path, batch, tokens)
            ratios.append(beside / alone)
            print(f"round {number + 1}: alone {alone:.1f}, beside {beside:.1f} tokens/s")
    finally:
        await engine.stop()
    print(f"median ratio {statistics.median(ratios):.3f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="an MLX model folder; the neighbour is the same")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    asyncio.run(run(given.model, given.rounds, given.batch, given.tokens))


if __name__ == "__main__":
    main()
