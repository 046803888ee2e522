"""Measures mlx-server beside mlx_lm.server and mlx-lm in process, on one model folder.

    python -m benchmarks.serving [--cells greedy,shared] [--rounds 3] [--peer NAME=COMMAND] ...

The servers run one at a time, in interleaved rounds (A B C A B C …), so that a machine which gets
slower or faster in between does so for all of them. On a Linux CPU every server gets the same
OpenBLAS and the same float32 weights, made from the demo model; `--quantized` leaves the weights,
and how mlx_lm.server is started, as they come.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from benchmarks.cells import GROUPS, Group, Peers
from benchmarks.machine import machine
from benchmarks.measures import Measurement, Outcome
from benchmarks.plots import write_plot
from benchmarks.report import Report, print_table, write_json, write_markdown
from benchmarks.servers import MLX_LM, OURS, ROOT, Bench, Server, peer
from mlx_server.config import Settings

_DEMO = "smollm2-135m"
_OUT = ROOT / "benchmarks" / "out"
_IN_PROCESS = "in_process"
_TABLE_WIDTH = 150


def main() -> None:
    """Entry point of the command."""
    arguments = _arguments()
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        bench = _bench(arguments, console)
        for name in arguments.cells:
            _publish(_run(name, bench, arguments, console), arguments, console)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _run(name: str, bench: Bench, arguments: argparse.Namespace, console: Console) -> Report:
    """All rounds of one group."""
    measurements = []
    for number in range(arguments.rounds):
        for server, measure in _turns(GROUPS[name], number, bench, arguments):
            for cell, figures in measure():
                measurements.append(Measurement(server, number, cell, figures))
                told = ", ".join(f"{heading} {value:.4g}" for heading, value in figures.items())
                console.print(f"{name}, round {number + 1}, {server}, {cell}: {told}")
    title = GROUPS[name].title + (" (quantized)" if arguments.quantized else "")
    return Report(name, title, _settings(arguments, bench), machine(), measurements)


def _turns(
    group: Group, number: int, bench: Bench, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Iterator[Outcome]]]]:
    """Who takes part in a round of the group, ours first, and what measures them."""
    peers = {
        Peers.COMPARED: arguments.rounds,
        Peers.TOLD: arguments.information_rounds,
        Peers.NONE: 0,
    }
    for server in (OURS, MLX_LM, *arguments.peer):
        measured = server is OURS or number < peers[group.peers]
        if measured and _wanted(server, arguments):
            yield server.name, partial(group.run, bench, server, number)
    if group.limit is not None and _IN_PROCESS in arguments.servers:
        yield _IN_PROCESS, partial(group.limit, bench)


def _wanted(server: Server, arguments: argparse.Namespace) -> bool:
    return server.name in arguments.servers or server in arguments.peer


def _publish(report: Report, arguments: argparse.Namespace, console: Console) -> None:
    name = report.group + ("-quantized" if arguments.quantized else "")
    print_table(report, console)
    write_json(report, arguments.out / f"{name}.json")
    write_plot(report, arguments.out / f"{name}.png")
    console.print(f"written: {name}.json and {name}.png in {arguments.out}")
    if arguments.markdown is not None:
        plot = Path("plots", f"{name}.png")
        write_plot(report, arguments.markdown.parent / plot)
        write_markdown(report, arguments.markdown, plot.as_posix())


def _bench(arguments: argparse.Namespace, console: Console) -> Bench:
    """Finds or makes the model folder; everything measured shares what this returns."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    model = arguments.model or _demo_folder(console)
    if not arguments.quantized:
        model = _float32_folder(model, "weights", arguments.out, console)
    elif arguments.float32_scales:
        model = _float32_folder(model, "scales", arguments.out, console)
    return Bench(
        model=model,
        logs=logs,
        openblas_for_peers=not arguments.quantized,
        seed=arguments.seed,
        tokens=arguments.tokens,
        requests=arguments.requests,
        streams=arguments.streams,
    )


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


def _settings(arguments: argparse.Namespace, bench: Bench) -> dict[str, str]:
    peers = "started the ordinary way" if arguments.quantized else "with the same OpenBLAS"
    return {
        "model": f"`{bench.model.name}`",
        "mlx-lm": peers,
        "rounds": str(arguments.rounds),
        "tokens a request": str(arguments.tokens),
        "requests a stream": str(arguments.requests),
        "seed": str(arguments.seed),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cells", type=_cells, help=f"of {','.join(GROUPS)}; all if unset")
    parser.add_argument("--model", type=Path, help="an MLX model folder; the demo model if unset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--information-rounds",
        type=int,
        default=1,
        help="rounds of the other servers in cells where they are no target",
    )
    parser.add_argument("--streams", type=_numbers, help="for greedy and sampled, e.g. 1,4,8,16")
    parser.add_argument("--tokens", type=int, default=48, help="completion tokens a request")
    parser.add_argument("--requests", type=int, default=1, help="requests a stream sends in turn")
    parser.add_argument("--servers", type=_servers, help=f"of {','.join(_SERVERS)}")
    parser.add_argument(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another server with an OpenAI API; its command has {model} and {port}",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which prompts are sent")
    parser.add_argument(
        "--quantized", action="store_true", help="the model as it comes; greedy, 8 streams if unset"
    )
    parser.add_argument(
        "--float32-scales",
        action="store_true",
        help="with --quantized: scales in float32, without which a CPU needs hours",
    )
    parser.add_argument("--out", type=Path, default=_OUT, help="folder for JSON, plots and logs")
    parser.add_argument("--markdown", type=Path, help="file that gets sections of results")
    return _with_defaults(parser.parse_args())


_SERVERS = [OURS.name, MLX_LM.name, _IN_PROCESS]


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on whether the model is measured as it comes."""
    quantized = arguments.quantized
    arguments.cells = arguments.cells or (["greedy"] if quantized else list(GROUPS))
    arguments.streams = arguments.streams or ((8,) if quantized else None)
    arguments.servers = arguments.servers or (_SERVERS[:2] if quantized else _SERVERS)
    return arguments


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _cells(text: str) -> list[str]:
    return _known(text, list(GROUPS))


def _servers(text: str) -> list[str]:
    return _known(text, _SERVERS)


def _known(text: str, known: list[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}")
    return names


def _peer(text: str) -> Server:
    name, sign, command = text.partition("=")
    if not (name and sign and command) or name in _SERVERS:
        raise argparse.ArgumentTypeError("give NAME=COMMAND, with a name of its own")
    return peer(name, command)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Ends a run asked to terminate the way Ctrl-C does: with its servers stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
