"""Requests of all kinds, on models of all kinds: the text with guesses is the text without."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from mlx_server.engine.protocol import Generate, Row, Sampling
from tests.engine.conftest import request, rows_of, started
from tests.engine.test_grammar import STOP, grammar_of
from tests.engine.test_ranks import entries
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.ties import NEAR_TIE
from tests.support.tiny import (
    FAMILY_TEMPLATE,
    build_quantized,
    build_tiny_adapter,
    build_tiny_model,
    save_text_side,
    tiny_tokenizer,
)

EACH = 25
"""Requests to a model."""
AT_ONCE = 8
FORM = grammar_of(
    {
        "type": "object",
        "properties": {
            "the_first_of_its_names": {"type": "string", "maxLength": 12},
            "how_many_there_are_of_them": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["the_first_of_its_names", "how_many_there_are_of_them"],
        "additionalProperties": False,
    }
)


class Model(NamedTuple):
    path: Path
    adapter: Path | None = None
    kv_bits: int | None = None

    @property
    def near(self) -> float:
        """Between log-probabilities. In a quantized cache rounding may take a number to the next of
        its 256 steps.
        """
        return 0.02 if self.kv_bits else NEAR_TIE


def plain(folder: Path) -> Model:
    return Model(build_tiny_model(folder, hidden=128))


def quantized_caches(folder: Path) -> Model:
    return Model(build_tiny_model(folder, hidden=128), kv_bits=8)


def adapted(folder: Path) -> Model:
    base = build_tiny_model(folder, hidden=128)
    return Model(base, build_tiny_adapter(base, folder.with_name("adapter")))


def quantized(folder: Path) -> Model:
    base = build_tiny_model(folder.with_name("base"), hidden=128)
    build_tiny_model(folder, hidden=128)
    return Model(build_quantized(base, folder, bits=8, group_size=32))


def of(name: str) -> Callable[[Path], Model]:
    """A model of `ARCHITECTURES` that can read and write."""

    def build(folder: Path) -> Model:
        tokenizer = tiny_tokenizer()
        size = {"vocab_size": tokenizer.get_vocab_size()}
        own = ARCHITECTURES[name].get("text_config")
        build_architecture(folder, name, **size, **({"text_config": own | size} if own else {}))
        config = json.loads((folder / "config.json").read_text())
        save_text_side(folder, "llama", tokenizer, FAMILY_TEMPLATE)
        (folder / "config.json").write_text(json.dumps(config))
        return Model(folder)

    return build


MODELS: dict[str, Callable[[Path], Model]] = {
    "plain": plain,
    "quantized caches": quantized_caches,
    "LoRA": adapted,
    "quantized": quantized,
    "windows": of("gemma3"),
    "windows and sinks": of("gpt_oss"),
    "latents": of("deepseek_v3"),
    "recurrent states": of("qwen3_5"),
}


def requests_for(count: int) -> list[Generate]:
    """Greedy and drawn, penalised, biased, bound to a grammar, and ended by tokens."""
    made = []
    for i in range(count):
        sampling = Sampling(
            seed=i,
            temperature=[0.0, 0.6, 1.0][i % 3],
            top_p=[1.0, 0.9][i // 3 % 2],
            repetition_penalty=[1.0, 1.15][i // 2 % 2],
            frequency_penalty=[0.0, 0.3][i // 5 % 2],
            logit_bias=[{}, {}, {60: 3.0, 61: -100.0}][i // 4 % 3],
        )
        prompt = [(7 * j + 3 * i) % 250 + 5 for j in range(4 + 37 * i % 190)]
        more: dict[str, Any] = {}
        if i % 5 == 4:
            more = {"grammar": FORM, "stop_tokens": [STOP]}
        elif i % 7 == 3:
            more = {"stop_tokens": list(range(40, 48))}
        made.append(request(prompt, 60, sampling, logprobs=3, **more))
    return made


async def said(model: Model, asked: list[Generate], *, guessing: bool) -> list[list[Row]]:
    own: dict[str, Any] = {"guesses_always": True} if guessing else {"speculation": "off"}
    parts = [asked[i : i + AT_ONCE] for i in range(0, len(asked), AT_ONCE)]
    async with started(model.path, adapter=model.adapter, kv_bits=model.kv_bits, **own) as engine:
        return [rows for part in parts for rows in await rows_of(engine, *part)]


def tokens_in(rows: list[Row]) -> list[int]:
    return [token for row in rows for token in row.tokens]


def nearly_right(tokens: list[int], number: int) -> list[int]:
    """With a wrong token here and there."""
    rng = random.Random(number)
    return [rng.randrange(5, 250) if rng.random() < 0.1 else token for token in tokens]


def tied(rows: list[Row], others: list[Row], near: float) -> bool:
    """Whether they say the same but for a near-tie; fails if they say anything else."""
    ours, theirs = entries(rows), entries(others)
    assert len(ours) == len(tokens_in(rows))
    pair = next((p for p in zip(ours, theirs, strict=False) if p[0].token != p[1].token), None)
    if pair is None:
        assert tokens_in(rows) == tokens_in(others)
        assert rows[-1].finish == others[-1].finish
        return False
    one, other = (dict(entry.top) for entry in pair)
    shared = one.keys() & other.keys()
    assert all(abs(one[token] - other[token]) < near for token in shared), pair
    if pair[0].token in other and pair[1].token in other:
        assert abs(other[pair[0].token] - other[pair[1].token]) < near, pair
    return True


@pytest.mark.soak
async def test_two_hundred_requests_of_all_kinds_say_the_same_with_guesses(tmp_path: Path) -> None:
    ties = guessed = accepted = 0
    for name, build in MODELS.items():
        model = build(tmp_path / name / "model")
        asked = requests_for(EACH)
        expected = await said(model, asked, guessing=False)
        foreseen = [
            msgspec.structs.replace(one, prediction=nearly_right(tokens_in(rows), i))
            for i, (one, rows) in enumerate(zip(asked, expected, strict=True))
        ]
        answers = await said(model, foreseen, guessing=True)
        told = [row for rows in answers for row in rows]
        mine = sum(row.accepted for row in told)
        pairs = zip(answers, expected, strict=True)
        differing = sum(tied(ours, theirs, model.near) for ours, theirs in pairs)
        print(f"{name}: {sum(row.guessed for row in told)} guessed, {mine} right, {differing} ties")
        assert mine > 10 * EACH, name
        guessed, accepted = guessed + sum(row.guessed for row in told), accepted + mine
        ties += differing
    assert guessed > 1.1 * accepted
    assert ties <= 2
