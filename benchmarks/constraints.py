"""What constraints cost: the throughput of constrained streams, and the first token's delay.

    python -m benchmarks.constraints MODEL_FOLDER [--streams 8] [--tokens 100] [--rounds 5]

Both sides of each comparison run in turns on one engine, at temperature 1. A constrained stream
writes an array of objects that may not end before the tokens do. For the delay, every request
comes with a schema of 100 fields that the engine has not seen.
"""

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling
from mlx_server.models.pool.resumable import ResumableEngine

PROMPT_TOKENS = 64
FIELDS = 100
KINDS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 40},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue"]},
]


def schema_of(prefix: str, fields: int) -> dict[str, Any]:
    """An object of so many required fields, whose names begin with `prefix`."""
    names = [f"{prefix}_{i}" for i in range(fields)]
    properties = {name: KINDS[i % len(KINDS)] for i, name in enumerate(names)}
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def grammar_of(schema: dict[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


ENDLESS = grammar_of({"type": "array", "minItems": 1000, "items": schema_of("field", 4)})


@dataclass
class Prompts:
    """Prompts that no cache knows."""

    vocab_size: int
    made: int = 0

    def next(self) -> list[int]:
        self.made += 1
        return [(self.made * 7919 + 31 * i) % self.vocab_size for i in range(PROMPT_TOKENS)]


class Comparison:
    """Measures one engine."""

    def __init__(self, engine: EngineClient) -> None:
        if engine.ready is None:
            raise SystemExit("the engine is not loaded")
        self.engine = ResumableEngine(engine.model_id)
        self.engine.replicas[0].attach(engine)
        self.prompts = Prompts(engine.ready.vocab_size)

    async def rate(self, streams: int, tokens: int, grammar: str | None) -> float:
        """Tokens a second of all streams together, from the first token on."""
        times: list[float] = []
        requests = [self._request(tokens, grammar, seed) for seed in range(streams)]
        with self.engine.generate(requests, "benchmark") as stream:
            async for _, row in stream.rows():
                times += [time.perf_counter()] * len(row.tokens)
        if len(times) != streams * tokens:
            raise SystemExit(f"{len(times)} tokens came instead of {streams * tokens}")
        return (len(times) - 1) / (times[-1] - times[0])

    async def first_token(self, grammar: str | None) -> float:
        """Seconds until a lone request has its first token."""
        started = time.perf_counter()
        with self.engine.generate([self._request(2, grammar, 0)], "benchmark") as stream:
            async for _ in stream.rows():
                return time.perf_counter() - started
        raise SystemExit("no token came")

    def _request(self, tokens: int, grammar: str | None, seed: int) -> Generate:
        settings = Sampling(temperature=1.0, seed=seed)
        return Generate(0, self.prompts.next(), settings, tokens, grammar=grammar)


async def compare(folder: Path, streams: int, tokens: int, rounds: int) -> None:
    """Run both comparisons and print them."""
    engine = await EngineClient.start(folder.name, folder, LoadOptions())
    try:
        comparison = Comparison(engine)
        await comparison.rate(streams, 8, None)
        await comparison.rate(streams, 8, ENDLESS)
        ratios = []
        for _ in range(rounds):
            free = await comparison.rate(streams, tokens, None)
            bound = await comparison.rate(streams, tokens, ENDLESS)
            ratios.append(bound / free)
            print(f"free {free:.1f} tokens/s, constrained {bound:.1f} tokens/s")
        print(f"constrained/free of {streams} streams: {statistics.median(ratios):.3f}")
        delays = []
        for i in range(4 * rounds):
            free = await comparison.first_token(None)
            grammar = grammar_of(schema_of(f"round{i}", FIELDS))
            delays.append(await comparison.first_token(grammar) - free)
        print(
            f"first token with a new schema of {FIELDS} fields: later by "
            f"{statistics.median(delays) * 1000:.1f} ms, at most {max(delays) * 1000:.1f} ms"
        )
    finally:
        await engine.stop()


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(compare(options.model, options.streams, options.tokens, options.rounds))


if __name__ == "__main__":
    main()
