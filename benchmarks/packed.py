"""What a CPU gains by multiplying by quantized weights as they are.

    python -m benchmarks.packed MODEL_FOLDER [--rounds 3]

Milliseconds of a decode step by its rows and tokens a second of a prompt, with weights in float32
(`always`), quantized (`packed`), and as `dequantize = "auto"` has them (`both`): medians, the
formats in turns.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import LoadOptions
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.mixed import Part

FORMATS: tuple[Literal["always", "both", "packed"], ...] = ("always", "both", "packed")
ROWS = (1, 2, 4, 8)
LENGTH, STEPS = 128, 8


def prompt(seed: int) -> mx.array:
    return mx.array([[(7 * i + seed) % 4000 + 100 for i in range(LENGTH)]])


def prefilled(model: Backend) -> float:
    started = time.perf_counter()
    model.prefill(prompt(0), model.new_cache())
    return time.perf_counter() - started


def stepped(model: Backend, rows: int) -> float:
    """Seconds of a step."""
    caches = [model.new_cache() for _ in range(rows)]
    for row, cache in enumerate(caches):
        model.prefill(prompt(row), cache)
    together = model.caches.merge(caches)
    tokens, times = mx.full((rows, 1), 5, dtype=mx.uint32), []
    for _ in range(STEPS + 2):
        started = time.perf_counter()
        logits = model.step([Part(tokens, together)], rows).logits
        tokens = mx.argmax(logits[:, -1], axis=-1)[:, None]
        mx.eval(tokens)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    memory, models = DeviceMemory("90%", None), dict[str, Backend]()
    for format_ in FORMATS:
        started = time.perf_counter()
        models[format_] = Backend(options.model, LoadOptions(dequantize=format_), memory)
        seconds, size = time.perf_counter() - started, models[format_].weights_bytes / 1e6
        print(f"{format_}: loaded in {seconds:.1f} s, {size:.0f} MB of weights", flush=True)
    steps: dict[tuple[str, int], list[float]] = {(f, rows): [] for f in FORMATS for rows in ROWS}
    prompts: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(options.rounds):
        for name, model in models.items():
            prompts[name].append(LENGTH / prefilled(model))
            for rows in ROWS:
                steps[name, rows].append(1000 * stepped(model, rows))
    print(f"| weights | {' | '.join(f'{rows} rows' for rows in ROWS)} | prompt |")
    for name in FORMATS:
        cells = [f"{statistics.median(steps[name, rows]):.0f}" for rows in ROWS]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(prompts[name]):.0f} |")


if __name__ == "__main__":
    main()
