"""What speculation gains and costs: the same requests with it and without, in turns.

    python -m benchmarks.speculation MODEL_FOLDER [--rounds 3] [--only editing] [--control]

With `--control` both sides are the same: how far ratios are from 1 then is how far they can be
trusted.

MODEL_FOLDER holds the model that writes freely; float32 is advised, as in the other benchmarks.
Editing is measured with random weights in SmolLM2-135M's shapes that answer with a given text, so
that guesses come true as often as with a model that is able to edit. So is a draft model: a small
one answers with the same text, wrongly at some 30 % of its places; and so is a model with a head of
its own, in the manner of Qwen 3.5, which is wrong as often.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
from llguidance import LLMatcher
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_5
from msgspec import structs

from mlx_server.engine.client import EngineClient
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling
from mlx_server.engine.run.heads.qwen import QwenHead
from mlx_server.models.pool.resumable import ResumableEngine
from mlx_server.models.text.grammars.parts import JSON_OPTIONS

VOCABULARY, WIDTH = 49152, 576
SHAPES = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": False,
}
DRAFT_SHAPES = SHAPES | {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
HEADED_WIDTH = 768
HEADED_SHAPES = {
    "hidden_size": HEADED_WIDTH,
    "num_hidden_layers": 24,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "linear_num_value_heads": 12,
    "linear_num_key_heads": 12,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
}
MISTAKEN = 0.3
"""Share of the places at which the draft model, or the head, is wrong."""
TEXT, EDITED, WRONG, BEGIN = 1000, 3000, 5000, 999
"""The first tokens of the text, of its edited places, and of the draft model's mistakes, and the
one that the answer follows.
"""
TOKENS, DRAFTED = 400, 160
"""Of an edited text, and of one that a draft model guesses."""
EVERY = 40
"""Tokens from one edited place to the next."""


def answer_of(place: int) -> int:
    """The token at a place of the edited text."""
    return (EDITED if place % EVERY == EVERY - 1 else TEXT) + place


def draft_of(place: int) -> int:
    """The token that the draft model takes to come there."""
    mistaken = random.Random(place).random() < MISTAKEN
    return WRONG + place if mistaken else answer_of(place)


def build_editor(folder: Path, dtype: str) -> Path:
    """Write a model that answers with the edited text, one token after the other."""
    return build_answering(folder, SHAPES, answer_of, dtype)


def build_draft(folder: Path, dtype: str) -> Path:
    """Write a small model that answers nearly so."""
    return build_answering(folder, DRAFT_SHAPES, draft_of, dtype)


def build_answering(
    folder: Path, shapes: dict[str, Any], answer: Callable[[int], int], dtype: str
) -> Path:
    """Write a model that says `answer` of each place of the text, given the one before.

    Its layers compute, but add nothing, so that the last token alone decides.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shapes))
    vocabulary = {f"token {id_}": id_ for id_ in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(shapes))
    weights = dict(tree_flatten(model.parameters()))
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] = mx.zeros_like(weights[name])
    known = mx.random.normal((VOCABULARY, shapes["hidden_size"]))
    head = mx.zeros_like(known)
    text = [answer_of(place) for place in range(TOKENS)]
    head[mx.array([answer(place) for place in range(TOKENS)])] = known[
        mx.array([BEGIN, *text[:-1]])
    ]
    weights["model.embed_tokens.weight"], weights["lm_head.weight"] = known, head
    kind = getattr(mx, dtype)
    weights = {name: array.astype(kind) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def build_headed(folder: Path, dtype: str) -> Path:
    """Write a model with a head of its own that answers with the text; the head is mistaken."""
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3_5", "text_config": HEADED_SHAPES}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    arguments = model.language_model.args
    layer = qwen3_5.DecoderLayer(arguments, arguments.full_attention_interval - 1)
    own = QwenHead(layer, HEADED_WIDTH, arguments.rms_norm_eps)
    weights = dict(tree_flatten(model.parameters()))
    of_head: dict[str, mx.array] = dict(tree_flatten(cast(Any, own).parameters()))
    weights |= {f"language_model.mtp.{name}": one for name, one in of_head.items()}
    for name in weights:
        if any(part in name for part in ("o_proj", "out_proj", "down_proj")):
            weights[name] = mx.zeros_like(weights[name])
    text = mx.array([BEGIN, *(answer_of(place) for place in range(TOKENS))])
    known = mx.random.normal((HEADED_SHAPES["vocab_size"], HEADED_WIDTH))
    head = mx.zeros_like(known)
    head[text[1:]] = known[text[:-1]]
    weights["language_model.model.embed_tokens.weight"] = known
    weights["language_model.lm_head.weight"] = head
    # What leads to a mistaken place is taken for what leads to the next one.
    wrong = [place for place in range(1, TOKENS) if draft_of(place) != answer_of(place)]
    before = known[text[mx.array(wrong)]]
    turned = (known[text[mx.array(wrong) + 1]] - before).T @ (before / HEADED_WIDTH)
    weights["language_model.mtp.fc.weight"] = mx.concatenate(
        [mx.eye(HEADED_WIDTH) + turned, mx.zeros((HEADED_WIDTH, HEADED_WIDTH))], axis=1
    )
    kind = getattr(mx, dtype)
    weights = {name: array.astype(kind) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def edits(streams: int) -> list[Generate]:
    """The text comes in the prompt as it was before."""
    prompt = [TEXT + place for place in range(TOKENS)]
    return [
        Generate(0, [100 + stream, *prompt, BEGIN], Sampling(temperature=0.0, seed=0), TOKENS)
        for stream in range(streams)
    ]


def predicted(streams: int) -> list[Generate]:
    """The text as it was before is what the answer is predicted to be, as by OpenAI's API."""
    before = [TEXT + place for place in range(TOKENS)]
    return [structs.replace(one, prediction=before) for one in answers(streams, TOKENS)]


def answers(streams: int, tokens: int = DRAFTED) -> list[Generate]:
    """The text comes out of the blue, so that only a model can guess it."""
    return [
        Generate(0, [100 + stream, BEGIN], Sampling(temperature=0.0, seed=0), tokens)
        for stream in range(streams)
    ]


def free(temperature: float, *, uneven: bool = False) -> Callable[[int], list[Generate]]:
    """`uneven`: answers end one after the other, with and without guesses. Those of equal length
    end together without, so that what it takes to let single ones go counts on one side only.
    """

    def requests(streams: int) -> list[Generate]:
        return [
            Generate(
                0,
                [(stream * 7919 + 31 * i) % 40000 + 100 for i in range(64)],
                Sampling(temperature=temperature, seed=stream),
                70 + 60 * stream // (streams - 1) if uneven else 100,
            )
            for stream in range(streams)
        ]

    return requests


def forms(streams: int) -> list[Generate]:
    """Objects whose keys are long and forced."""
    keys = [f"the_name_of_the_field_that_comes_as_number_{i}_of_all" for i in range(12)]
    schema = {
        "type": "object",
        "properties": {key: {"type": "integer", "minimum": 0, "maximum": 9} for key in keys},
        "required": keys,
        "additionalProperties": False,
    }
    options = cast(Any, JSON_OPTIONS)
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    return [
        Generate(
            0,
            [(stream * 7919 + 31 * i) % 40000 + 100 for i in range(64)],
            Sampling(temperature=1.0, seed=stream),
            400,
            grammar=str(grammar),
        )
        for stream in range(streams)
    ]


@dataclass(frozen=True)
class Cell:
    name: str
    model: Literal["given", "editor", "drafted", "headed"]
    requests: Callable[[int], list[Generate]]
    streams: int
    target: float


CELLS = [
    *(Cell("editing", "editor", edits, n, t) for n, t in ((1, 2.5), (4, 1.8), (8, 1.3))),
    Cell("prediction", "editor", predicted, 1, 2.5),
    *(Cell("draft model", "drafted", answers, n, t) for n, t in ((1, 1.3), (4, 0.98), (8, 0.98))),
    *(Cell("own head", "headed", answers, n, t) for n, t in ((1, 1.0), (4, 0.98), (8, 0.98))),
    *(Cell("free, greedy", "given", free(0.0), n, 0.98) for n in (1, 8, 16)),
    *(Cell("free, T 0.7", "given", free(0.7), n, 0.98) for n in (1, 8, 16)),
    *(
        Cell(f"free, uneven, {name}", "given", free(temperature, uneven=True), n, 0.98)
        for name, temperature in (("greedy", 0.0), ("T 0.7", 0.7))
        for n in (8, 16)
    ),
    *(Cell("JSON by schema", "given", forms, n, t) for n, t in ((1, 1.5), (8, 1.2))),
]


class Side:
    """An engine, with or without speculation."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self._engine = ResumableEngine(client.model_id)
        self._engine.replicas[0].attach(client)

    @classmethod
    async def start(cls, folder: Path, *, guesses: bool, draft: Path | None = None) -> "Side":
        options = LoadOptions(
            speculation="auto" if guesses else "off",
            draft_path=str(draft) if draft else None,
            max_batch=32,
        )
        return cls(await EngineClient.start(folder.name, folder, options))

    async def seconds(self, requests: list[Generate]) -> tuple[float, int]:
        """From the first token to the last, and how many came."""
        tokens, first = 0, 0.0
        with self._engine.generate(requests, "benchmark") as stream:
            async for _, row in stream.rows():
                tokens += len(row.tokens)
                first = first or time.perf_counter()
        return time.perf_counter() - first, tokens


async def measure(
    folder: Path, cells: list[Cell], options: argparse.Namespace, draft: Path | None = None
) -> None:
    with_ = await Side.start(folder, guesses=not options.control, draft=draft)
    without = await Side.start(folder, guesses=False)
    try:
        for cell in cells:
            ratios, lengths = [], set()
            for side in (with_, without):
                await side.seconds(cell.requests(cell.streams))
            for number in range(options.rounds):
                order = [without, with_] if number % 2 == 0 else [with_, without]
                took = {}
                for side in order:
                    took[side], count = await side.seconds(cell.requests(cell.streams))
                    lengths.add(count)
                ratios.append(took[without] / took[with_])
            held = "yes" if statistics.median(ratios) >= cell.target else "NO"
            print(
                f"| {cell.name}, {cell.streams} streams | ≥ {cell.target} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
                f"| {held} | {max(lengths)} tokens |",
                flush=True,
            )
            if len(lengths) > 1:
                raise SystemExit(f"the answers' lengths differ: {lengths}")
    finally:
        await with_.client.stop()
        await without.client.stop()


async def compare(options: argparse.Namespace) -> None:
    cells = [cell for cell in CELLS if options.only in f"{cell.name}, {cell.streams}"]
    with tempfile.TemporaryDirectory() as home:
        editor = build_editor(Path(home) / "editor", options.dtype)
        if editing := [cell for cell in cells if cell.model == "editor"]:
            await measure(editor, editing, options)
        if drafted := [cell for cell in cells if cell.model == "drafted"]:
            draft = build_draft(Path(home) / "draft", options.dtype)
            await measure(editor, drafted, options, draft)
        if headed := [cell for cell in cells if cell.model == "headed"]:
            await measure(build_headed(Path(home) / "headed", options.dtype), headed, options)
    if rest := [cell for cell in cells if cell.model == "given"]:
        await measure(options.model, rest, options)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a cell's name")
    parser.add_argument("--dtype", default="float32", help="of the model that edits")
    parser.add_argument("--control", action="store_true", help="both sides without speculation")
    asyncio.run(compare(parser.parse_args()))


if __name__ == "__main__":
    main()
