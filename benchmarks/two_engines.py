"""What two models cost each other that work at the same time on a CPU.

    python -m benchmarks.two_engines MODEL_FOLDER [--rounds 3]

Each of two engines does the same; processors that are well shared take twice as long for both as
for one. Each round is one engine, then both.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from benchmarks.speculation import Side
from mlx_server.engine.protocol import Generate, Sampling

WORK = {
    "a prompt of 600 tokens": (1, 600, 1),
    "1 stream of 64 tokens": (1, 32, 64),
    "8 streams of 32 tokens": (8, 32, 32),
}


def requests(count: int, prompt: int, tokens: int, salt: int) -> list[Generate]:
    """Of one shape; no two prompts begin alike."""
    return [
        Generate(
            0,
            [((number + 1) * 7919 + 31 * i + salt * 977) % 40000 + 100 for i in range(prompt)],
            Sampling(temperature=0.7, seed=number),
            tokens,
        )
        for number in range(count)
    ]


async def seconds(sides: list[Side], shape: tuple[int, int, int], salt: int) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*(side.seconds(requests(*shape, salt)) for side in sides))
    return time.perf_counter() - begun


async def measure(folder: Path, rounds: int) -> None:
    sides = [await Side.start(folder, guesses=False) for _ in range(2)]
    try:
        for name, shape in WORK.items():
            await seconds(sides, shape, 0)
            took = [
                (await seconds(sides[:1], shape, 2 * n + 1), await seconds(sides, shape, 2 * n + 2))
                for n in range(rounds)
            ]
            ratios = [both / one for one, both in took]
            alone = statistics.median(one for one, _ in took)
            print(
                f"| {name} | {alone:.2f} s | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f}) |",
                flush=True,
            )
    finally:
        for side in sides:
            await side.client.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, arguments.rounds))


if __name__ == "__main__":
    main()
