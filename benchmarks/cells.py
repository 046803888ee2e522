"""What is measured: one function a group of cells, and each group's targets.

A group's servers take turns within a round, each started anew, and no prompt is sent twice to one
of them, so that no cache answers but for what a cell is about.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.client import (
    GREEDY,
    Answer,
    Endpoint,
    Request,
    ask,
    ask_all,
    user,
    wait_for,
)
from benchmarks.dialects import CHAT, MESSAGES, RESPONSES, Dialect, Message
from benchmarks.measures import RATE, Figures, Outcome, percentile, throughput
from benchmarks.prompts import Texts, distinct_prompts
from benchmarks.servers import Bench, Job, Running, Server, in_process

SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
WARM_UP_TOKENS = 4

SHARED_STREAMS, SHARED_TOKENS = 8, 1000
FIRST_TURN_TOKENS, FIRST_ANSWER_TOKENS, SECOND_ANSWER_TOKENS = 2000, 48, 8
LONG_PROMPT_TOKENS, LONG_ANSWER_TOKENS = 4000, 8
STREAM_TOKENS, STREAM_TOKENS_BEFORE = 400, 40
SAMPLERS, SAMPLERS_PROMPT_TOKENS = 32, 40
FRONT_STREAMS, FRONT_TOKENS = 16, 128
FRONT_DIALECTS = (CHAT, MESSAGES, RESPONSES)


class Peers(Enum):
    """Which part the other servers have in a group."""

    COMPARED = "compared in every round"
    TOLD = "measured in fewer rounds, for information"
    NONE = "not measured"


@dataclass(frozen=True)
class Target:
    """A bound for the median of our figure, or of its ratio to the same figure of `against`."""

    figure: str
    sign: Literal["≥", "≤"]
    bound: float
    against: str | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` is within the bound."""
        return value >= self.bound if self.sign == "≥" else value <= self.bound

    def __str__(self) -> str:
        ratio = f", ours/{self.against}" if self.against else ""
        return f"{self.figure}{ratio} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Group:
    """Cells that are measured and reported together."""

    title: str
    told: str
    """What is measured, in sentences."""
    run: Callable[[Bench, Server, int], Iterator[Outcome]]
    """The outcomes on one server in one round."""
    peers: Peers
    targets: Sequence[Target]
    plotted: Sequence[str]
    """The figures that the plot shows."""
    limit: Callable[[Bench], Iterator[Outcome]] | None = None
    """The same without a server."""


@dataclass(frozen=True)
class Throughput:
    """The cells that differ in the number of streams alone."""

    sampling: dict[str, Any]
    streams: tuple[int, ...]

    def run(self, bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
        """Over HTTP."""
        with server.running(bench) as running:
            for name, job in self._jobs(bench).items():
                ask_job(running.endpoint, job.warm_up, WARM_UP_TOKENS, self.sampling, job.streams)
                answers = ask_job(
                    running.endpoint, job.prompts, job.max_tokens, self.sampling, job.streams
                )
                yield name, throughput(answers, job.max_tokens)

    def limit(self, bench: Bench) -> Iterator[Outcome]:
        """Without a server."""
        jobs = self._jobs(bench)
        yield from zip(jobs, in_process(bench, list(jobs.values())), strict=True)

    def _jobs(self, bench: Bench) -> dict[str, Job]:
        every = bench.streams or self.streams
        prompts = distinct_prompts(sum(every) * (bench.requests + 1), bench.seed)
        jobs = {}
        for streams in every:
            warm_up = [prompts.pop() for _ in range(streams)]
            measured = [prompts.pop() for _ in range(streams * bench.requests)]
            name = f"{streams} stream{'s' if streams > 1 else ''}"
            jobs[name] = Job(streams, measured, warm_up, bench.tokens, **self.sampling)
        return jobs


def ask_job(
    endpoint: Endpoint,
    prompts: Sequence[str],
    max_tokens: int,
    options: dict[str, Any],
    streams: int | None = None,
    dialect: Dialect = CHAT,
) -> list[Answer]:
    """The answers to `prompts`, all asked alike."""
    requests = [Request([user(prompt)], max_tokens, options, dialect) for prompt in prompts]
    return wait_for(ask_all(endpoint, requests, streams))


def warm_up(endpoint: Endpoint) -> None:
    """One small request that has nothing to do with what follows."""
    ask_job(endpoint, ["Name three colours."], WARM_UP_TOKENS, GREEDY)


def shared_prefix(bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
    """Streams with one long system prompt and different questions, sent at once."""
    texts = Texts(bench.model, f"shared {bench.seed} {server.name} {number}")
    system = {"role": "system", "content": texts.text(SHARED_TOKENS)}
    prompts = distinct_prompts(2 * SHARED_STREAMS, bench.seed)
    requests = [
        Request([system, user(prompt)], bench.tokens) for prompt in prompts[SHARED_STREAMS:]
    ]
    with server.running(bench) as running:
        ask_job(running.endpoint, prompts[:SHARED_STREAMS], WARM_UP_TOKENS, GREEDY)
        answers = wait_for(ask_all(running.endpoint, requests))
    figures = throughput(answers, bench.tokens)
    figures["prompt tokens"] = sum(answer.prompt_tokens for answer in answers)
    figures["cached tokens"] = sum(answer.cached_tokens for answer in answers)
    yield f"{SHARED_STREAMS} streams, {SHARED_TOKENS} tokens shared", figures


def second_turn(bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
    """A chat's second turn right after its first."""
    texts = Texts(bench.model, f"turns {bench.seed} {server.name} {number}")
    with server.running(bench) as running:
        warm_up(running.endpoint)
        messages, first = _first_turn(running.endpoint, texts)
        second = _second_turn(running.endpoint, messages, first)
    yield "second turn", _turn_figures(first, second)


def second_turn_after_restart(bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
    """A chat's second turn after the server was stopped and started again."""
    texts = Texts(bench.model, f"restart {bench.seed} {number}")
    with tempfile.TemporaryDirectory() as folder:
        start = partial(server.running, bench, Path(folder), {"MLX_SERVER_DISK_CACHE": "8GB"})
        with start() as running:
            warm_up(running.endpoint)
            messages, first = _first_turn(running.endpoint, texts)
        with start() as running:
            warm_up(running.endpoint)
            second = _second_turn(running.endpoint, messages, first)
    yield "second turn after a restart", _turn_figures(first, second)


def _first_turn(endpoint: Endpoint, texts: Texts) -> tuple[list[Message], Answer]:
    text = texts.text(FIRST_TURN_TOKENS)
    messages = [user(f"Here are my notes.\n\n{text}\n\nWhat are they about?")]
    return messages, wait_for(ask(endpoint, Request(messages, FIRST_ANSWER_TOKENS)))


def _second_turn(endpoint: Endpoint, messages: list[Message], first: Answer) -> Answer:
    said = {"role": "assistant", "content": first.text}
    follow_up = user("Which of these people would you like to meet, and why?")
    return wait_for(ask(endpoint, Request([*messages, said, follow_up], SECOND_ANSWER_TOKENS)))


def _turn_figures(first: Answer, second: Answer) -> Figures:
    return {
        "first TTFT s": first.ttft,
        "second TTFT s": second.ttft,
        "second/first TTFT": second.ttft / first.ttft,
        "first prompt tokens": first.prompt_tokens,
        "second prompt tokens": second.prompt_tokens,
        "cached tokens": second.cached_tokens,
    }


def long_prompt(bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
    """A long prompt on an idle server, and another that arrives while a stream runs."""
    texts = Texts(bench.model, f"long {bench.seed} {server.name} {number}")
    first, other = (
        Request([user(texts.text(LONG_PROMPT_TOKENS))], LONG_ANSWER_TOKENS) for _ in range(2)
    )
    [prompt] = distinct_prompts(1, bench.seed)
    with server.running(bench) as running:
        warm_up(running.endpoint)
        alone = wait_for(ask(running.endpoint, first))
        stream, arriving = wait_for(
            _ask_during(running.endpoint, Request([user(prompt)], STREAM_TOKENS), other)
        )
    if stream.ended < arriving.arrivals[0]:
        raise RuntimeError("the stream ended before the long prompt was answered")
    gaps = stream.gaps()
    yield (
        f"{LONG_PROMPT_TOKENS} tokens arrive",
        {
            "TTFT alone s": alone.ttft,
            "TTFT s": arriving.ttft,
            "TTFT/alone": arriving.ttft / alone.ttft,
            "median gap before ms": percentile(gaps[: STREAM_TOKENS_BEFORE - 1], 0.5) * 1000,
            "median gap ms": percentile(gaps, 0.5) * 1000,
            "largest gap ms": max(gaps) * 1000,
            "largest/median gap": max(gaps) / percentile(gaps, 0.5),
            "prompt tokens": arriving.prompt_tokens,
        },
    )


async def _ask_during(
    endpoint: Endpoint, running: Request, arriving: Request
) -> tuple[Answer, Answer]:
    """The answers to `running`, and to `arriving`, sent when the other's text has come so far."""
    begun = asyncio.Event()

    def note(count: int) -> None:
        if count == STREAM_TOKENS_BEFORE:
            begun.set()

    async with asyncio.TaskGroup() as group:
        stream = group.create_task(ask(endpoint, running, note))
        await begun.wait()
        answer = await ask(endpoint, arriving)
    return stream.result(), answer


def samplers(bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
    """As many streams with different samplers, seeds and stop strings, and with equal ones."""
    texts = Texts(bench.model, f"samplers {bench.seed} {number}")
    kinds = {
        "equal": [SAMPLED] * SAMPLERS,
        "different": [_sampler(index) for index in range(SAMPLERS)],
    }
    # Whatever favours the one that comes first does so for each in turn.
    order = list(kinds) if number % 2 == 0 else list(reversed(kinds))
    rates = {}
    with server.running(bench) as running:
        for tokens in (WARM_UP_TOKENS, bench.tokens):
            for kind in order:
                requests = [
                    Request([user(texts.text(SAMPLERS_PROMPT_TOKENS))], tokens, options)
                    for options in ({**one, "ignore_eos": True} for one in kinds[kind])
                ]
                answers = wait_for(ask_all(running.endpoint, requests))
                rates[kind] = throughput(answers, tokens)
    figures = {f"{kind} {RATE}": rates[kind][RATE] for kind in kinds}
    figures["different/equal"] = rates["different"][RATE] / rates["equal"][RATE]
    tokens_of = {f"{kind} tokens": rates[kind]["tokens"] for kind in kinds}
    yield f"{SAMPLERS} streams", figures | tokens_of


def _sampler(index: int) -> dict[str, Any]:
    """One of many samplers, all different; the stop strings hardly ever come."""
    options: dict[str, Any] = {
        "temperature": 0.5 + 0.02 * index,
        "top_p": 0.8 + 0.006 * index,
        "seed": 1000 + index,
        "stop": [f"<<end {index}>>", f"~~ {index} ~~"],
    }
    if index % 2:
        options["top_k"] = 20 + index
    if index % 3 == 1:
        options["min_p"] = 0.01 + 0.001 * index
    if index % 4 == 2:
        options["repetition_penalty"] = 1.05 + 0.002 * index
    if index % 5 == 3:
        options |= {"presence_penalty": 0.1, "frequency_penalty": 0.01 * index}
    return options


def front_cpu(bench: Bench, server: Server, number: int) -> Iterator[Outcome]:
    """The processor time of the processes between the client and the engine, by protocol."""
    streams, count = FRONT_STREAMS, len(FRONT_DIALECTS)
    prompts = distinct_prompts((1 + count) * streams, bench.seed)
    with server.running(bench) as running:
        warm_ups, *asked = (prompts[i * streams : (i + 1) * streams] for i in range(1 + count))
        for dialect in FRONT_DIALECTS:
            options = {**GREEDY, "ignore_eos": True} if dialect.knows_ignore_eos else GREEDY
            ask = partial(ask_job, running.endpoint, options=options, dialect=dialect)
            ask(warm_ups, WARM_UP_TOKENS)
            answers, used = _used(running, partial(ask, asked.pop(), FRONT_TOKENS))
            figures = throughput(answers, FRONT_TOKENS)
            shares = {
                f"{name} CPU µs/token": seconds / figures["tokens"] * 1e6
                for name, seconds in used.items()
            }
            told = {name: figures[name] for name in (RATE, "tokens")}
            yield f"{streams} streams, {dialect.name}", shares | told


def _used(
    running: Running, job: Callable[[], list[Answer]]
) -> tuple[list[Answer], dict[str, float]]:
    """The answers, and the seconds of processor time of each process meanwhile."""
    processes = _processes(running)
    before = {name: _cpu_seconds(process) for name, process in processes.items()}
    answers = job()
    return answers, {name: _cpu_seconds(one) - before[name] for name, one in processes.items()}


def _processes(running: Running) -> dict[str, psutil.Process]:
    """The front and its two children, told apart by the modules that they run."""
    named = {"front": running.process}
    for child in running.process.children():
        command = " ".join(child.cmdline())
        for name, module in (("text", "models.text.worker"), ("engine", "engine.worker")):
            if module in command:
                named[name] = child
    return named


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


_GREEDY = Throughput(GREEDY, (1, 4, 8, 16))
_SAMPLED = Throughput(SAMPLED, (8, 16))
_STREAMED = "TTFT and ITL are what a client sees over HTTP; tokens/s counts prefill too."

GROUPS = {
    "greedy": Group(
        title="Greedy",
        told=f"Short prompts, greedy decoding. {_STREAMED}",
        run=_GREEDY.run,
        limit=_GREEDY.limit,
        peers=Peers.COMPARED,
        targets=[Target(RATE, "≥", 1.0, "in_process")],
        plotted=[RATE, "ITL p50 ms"],
    ),
    "sampled": Group(
        title="Sampled",
        told=f"Short prompts, temperature 0.7 and top-p 0.9; in process with mlx-lm's sampler. "
        f"{_STREAMED}",
        run=_SAMPLED.run,
        limit=_SAMPLED.limit,
        peers=Peers.COMPARED,
        targets=[Target(RATE, "≥", 1.3, "in_process"), Target(RATE, "≥", 1.5, "mlx_lm")],
        plotted=[RATE, "ITL p50 ms"],
    ),
    "shared": Group(
        title="Shared prefix",
        told=f"{SHARED_STREAMS} streams, sent at once, with one system prompt of {SHARED_TOKENS} "
        f"tokens that the server has not seen before, and different questions. {_STREAMED}",
        run=shared_prefix,
        peers=Peers.COMPARED,
        targets=[Target(RATE, "≥", 2.0, "mlx_lm")],
        plotted=[RATE, "TTFT p50 s"],
    ),
    "turns": Group(
        title="Second turn",
        told=f"A chat whose first turn has some {FIRST_TURN_TOKENS} tokens; the second turn holds "
        "the first, its answer and a short question.",
        run=second_turn,
        peers=Peers.TOLD,
        targets=[Target("second/first TTFT", "≤", 0.1)],
        plotted=["first TTFT s", "second TTFT s", "second/first TTFT"],
    ),
    "restart": Group(
        title="Second turn after a restart",
        told="The same, with the server stopped after the first turn and started again on the same "
        "home folder, with a disk cache of 8 GB; a small request warms it up before the second "
        "turn.",
        run=second_turn_after_restart,
        peers=Peers.NONE,
        targets=[Target("second/first TTFT", "≤", 0.2)],
        plotted=["first TTFT s", "second TTFT s", "second/first TTFT"],
    ),
    "long": Group(
        title="A long prompt arrives",
        told=f"While one greedy stream of {STREAM_TOKENS} tokens runs, a prompt of "
        f"{LONG_PROMPT_TOKENS} tokens arrives after its token {STREAM_TOKENS_BEFORE}; `alone` is "
        "another prompt as long on the idle server. Gaps are between the pieces of the stream.",
        run=long_prompt,
        peers=Peers.TOLD,
        targets=[Target("largest/median gap", "≤", 4.0), Target("TTFT/alone", "≤", 1.5)],
        plotted=["largest/median gap", "TTFT/alone"],
    ),
    "samplers": Group(
        title="Different samplers",
        told=f"{SAMPLERS} streams with different temperatures, filters, penalties, seeds and stop "
        "strings, and as many at temperature 0.7 and top-p 0.9; prompts and answers equally long.",
        run=samplers,
        peers=Peers.NONE,
        targets=[Target("different/equal", "≥", 0.9)],
        plotted=[f"equal {RATE}", f"different {RATE}", "different/equal"],
    ),
    "front": Group(
        title="CPU of the front",
        told=f"User and system time of each process during {FRONT_STREAMS} greedy streams of up "
        f"to {FRONT_TOKENS} tokens in each protocol, requests' beginnings and timers included, "
        "divided by the tokens streamed.",
        run=front_cpu,
        peers=Peers.NONE,
        targets=[Target("front CPU µs/token", "≤", 150.0)],
        plotted=["front CPU µs/token", "text CPU µs/token"],
    ),
}
