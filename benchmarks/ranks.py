"""What it costs and gains to divide a model among processes of this machine.

    python -m benchmarks.ranks [MODEL_FOLDER] [--ranks 1 2] [--division tensor pipeline]
        [--rows 1 8] [--steps 30]

Without MODEL_FOLDER, random weights nearly in SmolLM2-135M's shapes, with heads that two ranks can
share. A decode step of as many rows, in milliseconds: as it is, and with what ranks send each other
left out, so that rank 0's computing is left; the median and, in brackets, the least, which other
work on the machine disturbs least. The difference is what it waits for others: by tensor for sums,
by pipeline for their computing above all, since ranks compute one after the other. The model for
other links divides a step and adds so many sums of so many microseconds. Each rank has one thread,
as if it had a processor to itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

from benchmarks.machine import machine
from mlx_server.dimensions import Way
from mlx_server.engine.loading import prepare
from mlx_server.engine.protocol import Load, LoadOptions
from mlx_server.engine.ranks import ring
from mlx_server.engine.ranks.sharing import Alone

SHAPES = {
    "model_type": "qwen2",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LENGTH = 64
"""Tokens of each row before the first step."""
LINKS = {"31 us (RDMA over Thunderbolt)": 31e-6, "0.94 ms (TCP)": 0.94e-3}
"""Of a sum, from what others have published: a model of 27 billion weights in 64 layers gave 16.1
tokens/s on a Mac, 28.6 on two over RDMA, and 6.6 over a TCP ring."""


class Measured(Alone):
    """Each rank judges for itself."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()


@dataclass
class Step:
    """Milliseconds of each step, and bytes of the weights of a rank."""

    whole: list[float]
    computing: list[float]
    weights: int


def measure(
    folder: Path, rank: int, addresses: list[str], way: Way, rows: list[int], steps: int
) -> None:
    """One rank's part; with one address alone. Prints a line of JSON, times by number of rows."""
    size = len(addresses)
    options = LoadOptions(ranks=size, division=way)
    memory, _ = prepare(Load(str(folder), options))
    from mlx_server.engine.run import kv
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.run.mixed import Part

    group = ring.join(rank, [[one] for one in addresses]) if size > 1 else None
    ranks = Alone() if group is None else Measured(group)
    backend = Backend(folder, options, memory, ranks=ranks)

    def stepped(count: int) -> list[float]:
        caches = [backend.new_cache() for _ in range(count)]
        for cache in caches:
            backend.prefill(mx.array([list(range(LENGTH))]), cache)
        part = Part(mx.array([[7]] * count), kv.merge(caches))
        times = []
        for _ in range(steps + 2):
            started = time.perf_counter()
            mx.eval(backend.step([part], count).logits)
            if group is not None:  # the tokens drawn, without which no rank goes on
                mx.eval(mx.distributed.all_sum(mx.zeros(count), group=group))
            times.append(1000 * (time.perf_counter() - started))
        return times[2:]

    together = {count: stepped(count) for count in rows}
    mx.distributed.all_sum = lambda x, **_: x
    for name in ("send", "recv_like"):
        setattr(mx.distributed, name, lambda x, _: x)
    apart = {count: stepped(count) for count in rows}
    print(json.dumps({"whole": together, "computing": apart, "weights": backend.weights_bytes}))


def build(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(SHAPES))
    model = qwen2.Model(qwen2.ModelArgs.from_dict(SHAPES))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def divided(folder: Path, ranks: int, way: Way, rows: list[int], steps: int) -> dict[int, Step]:
    """All ranks at once; by number of rows what rank 0 has found."""
    addresses = ring.free_addresses([ring.LOOPBACK] * ranks)
    numbers = [*map(str, rows)]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.with_openblas", "benchmarks.ranks"),
                *(str(folder), "--steps", str(steps), "--division", way),
                *("--rows", *numbers, "--rank", str(rank), "--addresses", *addresses),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    first, *_ = [process.communicate()[0] for process in processes]
    found = json.loads(first)
    return {
        count: Step(found["whole"][str(count)], found["computing"][str(count)], found["weights"])
        for count in rows
    }


def table(found: dict[tuple[int, Way], dict[int, Step]]) -> list[str]:
    lines = [
        "| ranks | division | rows | step ms | computing | waiting | weights of a rank MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (ranks, way), steps in found.items():
        for rows, step in steps.items():
            waits = [at(step.whole) - at(step.computing) for at in (statistics.median, min)]
            lines.append(
                f"| {ranks} | {way} | {rows} | {_told(step.whole)} | {_told(step.computing)} | "
                f"{waits[0]:.0f} ({waits[1]:.0f}) | {step.weights / 1e6:.0f} |"
                if ranks > 1
                else f"| 1 | - | {rows} | {_told(step.whole)} | {_told(step.whole)} | - | "
                f"{step.weights / 1e6:.0f} |"
            )
    return lines


def _told(times: list[float]) -> str:
    return f"{statistics.median(times):.0f} ({min(times):.0f})"


def predicted(step: float, sums: int, ranks: int, link: float) -> float:
    """How many times as fast a step of `step` seconds is among ranks with a machine each.

    What is not divided, embeddings and the output projection, is left out: little of a large model.
    """
    return step / (step / ranks + sums * link)


def model_of_links() -> list[str]:
    """For a step that takes 62 ms on one machine, as published, and one of a quarter of that."""
    lines = [
        "| step alone | sums | a sum takes | 2 ranks | 4 ranks |",
        "| --- | ---: | --- |" + " ---: |" * 2,
    ]
    for step, sums in ((62e-3, 128), (15e-3, 64)):
        for name, link in LINKS.items():
            gains = (f"{predicted(step, sums, ranks, link):.2f}" for ranks in (2, 4))
            lines.append(f"| {1000 * step:.0f} ms | {sums} | {name} | {' | '.join(gains)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--division", nargs="+", default=["tensor", "pipeline"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--addresses", nargs="+")
    given = parser.parse_args()
    if given.rank is not None:
        [way] = given.division
        measure(given.model, given.rank, given.addresses, way, given.rows, given.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.model or build(Path(temporary))
        found = {
            (n, way): divided(folder, n, way, given.rows, given.steps)
            for n in given.ranks
            for way in (given.division if n > 1 else given.division[:1])
        }
    print("\n".join(table(found)))
    print()
    print("\n".join(model_of_links()))
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    print(f"\n{facts}; model `{given.model.name if given.model else 'random'}`")


if __name__ == "__main__":
    main()
