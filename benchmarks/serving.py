"""Compares mlx-server with mlx_lm.server and with mlx-lm in process, on one model folder.

    python -m benchmarks.serving [--rounds 3] [--streams 1,4,8,16] [--quantized] ...

The servers run one at a time, in interleaved rounds (A B C A B C …), so that a machine which gets
slower or faster in between does so for all of them. On a Linux CPU every server gets the same
OpenBLAS and the same float32 weights, made from the demo model; `--quantized` leaves the weights,
and how mlx_lm.server is started, as they come.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from benchmarks.measures import Cell, Job, Measurement
from benchmarks.prompts import distinct_prompts
from benchmarks.report import (
    Report,
    machine,
    print_table,
    write_json,
    write_markdown,
    write_plot,
)
from benchmarks.servers import MEASURES, ROOT, Bench
from mlx_server.config import Settings

_DEMO = "smollm2-135m"
_OUT = ROOT / "benchmarks" / "out"
# Temperature and top-p.
_MODES = {"greedy": (0.0, 1.0), "sampled": (0.7, 0.9)}
_TABLE_WIDTH = 150


def main() -> None:
    """Entry point of the command."""
    arguments = _arguments()
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        report = _run(arguments, console)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    print_table(report, console)
    write_json(report, arguments.out / f"{arguments.name}.json")
    write_plot(report, arguments.out / f"{arguments.name}.png")
    console.print(f"written: {arguments.name}.json and {arguments.name}.png in {arguments.out}")
    if arguments.markdown is not None:
        write_markdown(report, arguments.markdown)


def _run(arguments: argparse.Namespace, console: Console) -> Report:
    bench = _bench(arguments, console)
    jobs = _jobs(arguments)
    measurements: list[Measurement] = []
    for number in range(arguments.rounds):
        for server in arguments.servers:
            samples = MEASURES[server](bench, list(jobs.values()))
            for cell, sample in zip(jobs, samples, strict=True):
                measurements.append(Measurement(server, number, cell, sample))
                console.print(
                    f"round {number + 1}, {server}, {cell.name}: {sample.tokens_per_s:.1f} tokens/s"
                )
    return Report(_title(arguments, bench), _settings(arguments), machine(), measurements)


def _bench(arguments: argparse.Namespace, console: Console) -> Bench:
    """Finds or makes the model folder; everything measured shares what this returns."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    model = arguments.model or _demo_folder(console)
    if not arguments.quantized:
        model = _float32_folder(model, "weights", arguments.out, console)
    elif arguments.float32_scales:
        model = _float32_folder(model, "scales", arguments.out, console)
    return Bench(model, logs, openblas_for_peers=not arguments.quantized)


def _demo_folder(console: Console) -> Path:
    """The demo model's folder; the model is pulled if it is not there."""
    folder = Settings.load().models_folder / _DEMO
    if not folder.exists():
        console.print(f"pulling {_DEMO}")
        subprocess.run([sys.executable, "-m", "mlx_server", "pull", _DEMO], cwd=ROOT, check=True)
    return folder


def _float32_folder(model: Path, kind: str, out: Path, console: Console) -> Path:
    """A copy of `model` with float32 weights, or float32 scales only; made once."""
    folder = out / "models" / f"{model.name}-float32{'-scales' if kind == 'scales' else ''}"
    if not folder.exists():
        console.print(f"making {folder.name}")
        command = [sys.executable, "-m", "benchmarks.float32", kind, str(model), str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def _jobs(arguments: argparse.Namespace) -> dict[Cell, Job]:
    """The work of every cell. No prompt is used twice, so no cache can answer for a model."""
    cells = [Cell(streams, mode) for mode in arguments.modes for streams in arguments.streams]
    needed = [cell.streams * (arguments.requests + 1) for cell in cells]
    prompts = distinct_prompts(sum(needed), arguments.seed)
    jobs = {}
    for cell in cells:
        warm_up = [prompts.pop() for _ in range(cell.streams)]
        measured = [prompts.pop() for _ in range(cell.streams * arguments.requests)]
        temperature, top_p = _MODES[cell.mode]
        jobs[cell] = Job(cell.streams, measured, warm_up, arguments.tokens, temperature, top_p)
    return jobs


def _title(arguments: argparse.Namespace, bench: Bench) -> str:
    if arguments.quantized:
        return f"{bench.model.name}, quantized, mlx_lm.server started the ordinary way"
    return f"{bench.model.name}, the same OpenBLAS for every server"


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    return {
        "rounds": str(arguments.rounds),
        "tokens a request": str(arguments.tokens),
        "requests a stream": str(arguments.requests),
        "prompt seed": str(arguments.seed),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, help="an MLX model folder; the demo model if unset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=_numbers, help="e.g. 1,4,8,16")
    parser.add_argument("--tokens", type=int, default=48, help="completion tokens a request")
    parser.add_argument("--requests", type=int, default=1, help="requests a stream sends in turn")
    parser.add_argument("--servers", type=_servers, help=",".join(MEASURES))
    parser.add_argument("--seed", type=int, default=0, help="decides which prompts are sent")
    parser.add_argument("--greedy", action="append_const", dest="modes", const="greedy")
    parser.add_argument("--sampled", action="append_const", dest="modes", const="sampled")
    parser.add_argument(
        "--quantized", action="store_true", help="the model as it comes, at 8 streams, greedy"
    )
    parser.add_argument(
        "--float32-scales",
        action="store_true",
        help="with --quantized: scales in float32, without which a CPU needs hours",
    )
    parser.add_argument("--out", type=Path, default=_OUT, help="folder for JSON, plot and logs")
    parser.add_argument("--markdown", type=Path, help="file that gets a section of results")
    return _with_defaults(parser.parse_args())


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on whether the model is measured as it comes."""
    quantized = arguments.quantized
    arguments.name = "quantized" if quantized else "serving"
    arguments.modes = arguments.modes or (["greedy"] if quantized else list(_MODES))
    arguments.streams = arguments.streams or ([8] if quantized else [1, 4, 8, 16])
    arguments.servers = arguments.servers or (["ours", "mlx_lm"] if quantized else list(MEASURES))
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _servers(text: str) -> Sequence[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such server: {', '.join(unknown)}")
    return names


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Ends a run asked to terminate the way Ctrl-C does: with its servers stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
