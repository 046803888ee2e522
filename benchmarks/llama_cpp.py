"""Decoding on a CPU against llama.cpp, with the same quantized weights.

    npm install --prefix FOLDER node-llama-cpp
    python -m benchmarks.llama_cpp MODEL_FOLDER FILE.gguf FOLDER [--rounds 5]

Tokens a second from the moment when all streams have begun, in turns: ours over HTTP, with guesses
off, llama.cpp's in the process that runs it. Both have two threads.
"""

import argparse
import asyncio
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.client import GREEDY, Endpoint, Request, ask_all, user
from benchmarks.servers import OURS, Bench

SCRIPT = Path(__file__).with_suffix(".mjs").resolve()
STREAMS = {1: 0.9, 8: 1.2}
"""And the ratios that are to be had."""
TOKENS = 200
PROMPT = "Once upon a time there was a little fox who lived in the forest and " * 4
ALONE = {"MLX_SERVER_SPECULATION": "off", "MLX_SERVER_PREFIX_CACHE": "0"}


def ours(endpoint: Endpoint, streams: int) -> float:
    """Tokens a second."""
    options = GREEDY | {"ignore_eos": True}
    asked = [Request([user(PROMPT)], TOKENS, options) for _ in range(streams)]
    answers = asyncio.run(ask_all(endpoint, asked))
    begun = max(answer.arrivals[0] for answer in answers)
    ended = max(answer.ended for answer in answers)
    return streams * (TOKENS - 1) / (ended - begun)


def theirs(file: Path, folder: Path, streams: int) -> float:
    """Tokens a second."""
    command = ["node", str(SCRIPT), str(file.resolve()), str(streams), str(TOKENS), PROMPT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path, help="the same model as GGUF")
    parser.add_argument("folder", type=Path, help="where node-llama-cpp is installed")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(
        "| streams | ours, tokens/s | llama.cpp | ratio | target |", 5 * "| ---: " + "|", sep="\n"
    )
    with tempfile.TemporaryDirectory() as logs:
        bench = Bench(given.model, Path(logs), False, 0, TOKENS, 1, None)
        with OURS.running(bench, env=ALONE) as server:
            ours(server.endpoint, 1)
            for streams, target in STREAMS.items():
                ours(server.endpoint, streams)
                pairs = [
                    (ours(server.endpoint, streams), theirs(given.file, given.folder, streams))
                    for _ in range(given.rounds)
                ]
                columns = [*zip(*pairs, strict=True), [one / other for one, other in pairs]]
                cells = [
                    f"{statistics.median(each):.3g} ({min(each):.3g}-{max(each):.3g})"
                    for each in columns
                ]
                print(f"| {streams} | {' | '.join(cells)} | ≥ {target} |", flush=True)


if __name__ == "__main__":
    main()
