"""A constraint is kept to the token, costs others nothing, and survives whatever a request does."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.grammar.grammar import (
    Allowed,
    Asked,
    Constraint,
    Grammar,
    Masker,
    Vocabulary,
)
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import Failed, Generate, LoadOptions, Row, Sampling, Tokens
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.sampling import sampler as sampling
from mlx_server.engine.sampling.graph import DeviceSampler
from mlx_server.engine.sampling.host import HostSampler
from mlx_server.engine.schedule.scheduler import Scheduler
from mlx_server.errors import EngineFailed
from tests.engine.conftest import idle, request, rows_of, started, tokens_of
from tests.support.engines import DirectEngine
from tests.support.tiny import build_tiny_model, tiny_tokenizer, token_id

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["user", "system", "assistant"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 4,
        },
        "open": {"type": "boolean"},
    },
    "required": ["name", "kind", "sizes", "open"],
    "additionalProperties": False,
}
TOKENIZER = tiny_tokenizer()
STOP = token_id(TOKENIZER, "<|end_of_text|>")
WORDS = "start: /[a-z ]{%d}/"
"""So many letters, and nothing else."""


def grammar_of(schema: dict[str, Any]) -> str:
    compact = {"whitespace_flexible": False}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact))


def bound(seed: int, grammar: str = "", max_tokens: int = 150, **more: Any) -> Generate:
    """A request for a document of `SCHEMA`, or of `grammar`, at temperature 1."""
    settings = Sampling(seed=seed, **more.pop("sampling", {}))
    more = {"stop_tokens": [STOP], **more}
    return request(
        range(seed + 3, seed + 20),
        max_tokens,
        settings,
        grammar=grammar or grammar_of(SCHEMA),
        **more,
    )


BOUND = [
    bound(1),
    bound(2, sampling={"top_p": 0.9, "frequency_penalty": 0.5}),
    bound(3, sampling={"temperature": 0.0}),
    bound(4, sampling={"top_k": 20, "repetition_penalty": 1.2}, logprobs=2),
    bound(5, sampling={"min_p": 0.05, "logit_bias": {STOP: 50.0}}),
    bound(6, WORDS % 40),
]
FREE = [
    request(range(5, 30), 60, Sampling(seed=1)),
    request(range(9, 19), 80, Sampling(temperature=0)),
    request(range(40, 60), 70, Sampling(seed=2, top_p=0.8, presence_penalty=0.5), logprobs=1),
]


def told(rows: Sequence[Row]) -> list[int]:
    return [token for row in rows for token in row.tokens]


def text_of(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=True))


def check(rows: Sequence[Row]) -> None:
    """Raise unless `rows` are a document of `SCHEMA` that has ended."""
    assert rows[-1].finish == "stop"
    assert told(rows)[-1] == STOP
    jsonschema.validate(json.loads(text_of(told(rows))), SCHEMA)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=1024)


@pytest.fixture(scope="module")
async def engine(model: Path) -> AsyncIterator[DirectEngine]:
    async with started(model, prefill_chunk=16) as client:
        yield client


# through an engine


async def test_documents_are_valid_and_free_rows_the_same_as_without_them(
    engine: DirectEngine,
) -> None:
    free = await tokens_of(engine, *FREE)
    rows = await rows_of(engine, *BOUND, *FREE)
    for document in rows[:5]:
        check(document)
    assert len(text_of(told(rows[5]))) == 40
    assert [told(one) for one in rows[len(BOUND) :]] == free
    alone = [(await tokens_of(engine, one))[0] for one in BOUND]
    assert [told(one) for one in rows[: len(BOUND)]] == alone


@pytest.mark.parametrize("family", ["qwen", "mistral", "gemma"])
async def test_documents_are_valid_whatever_the_kind_of_tokenizer(
    tmp_path: Path, family: str
) -> None:
    path = build_tiny_model(tmp_path / family, family)
    tokenizer = tiny_tokenizer(family)
    async with started(path) as engine:
        for rows in await rows_of(engine, *[bound(i, stop_tokens=[]) for i in range(6)]):
            assert rows[-1].finish == "stop"
            text = tokenizer.decode(told(rows)[:-1], skip_special_tokens=False)
            jsonschema.validate(json.loads(text), SCHEMA)


async def test_a_tokenizer_that_the_folder_lacks_is_the_one_that_is_given(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    async with started(path) as engine:
        engine.give_tokenizer(TOKENIZER.to_str().encode())
        [rows] = await rows_of(engine, BOUND[0])
        check(rows)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"eos_token_id": {}}'])
def test_a_broken_generation_config_costs_an_engine_nothing(tmp_path: Path, content: str) -> None:
    path = build_tiny_model(tmp_path / "model", context=1024)
    (path / "generation_config.json").write_text(content, encoding="utf-8")
    memory = DeviceMemory("4GB", None)
    backend = Backend(path, LoadOptions(dequantize="never"), memory)
    assert Vocabulary(path, backend.vocab_size).ends == [STOP]


async def test_a_document_goes_on_from_the_tokens_an_earlier_engine_sampled(
    engine: DirectEngine,
) -> None:
    for one in (BOUND[0], BOUND[1], BOUND[3]):
        [whole] = await tokens_of(engine, one)
        for cut in (1, 7, len(whole) - 1):
            rest = msgspec.structs.replace(
                one,
                prompt=one.prompt + whole[:cut],
                generated=cut,
                max_tokens=one.max_tokens - cut,
            )
            assert (await tokens_of(engine, rest, FREE[0], BOUND[4]))[0] == whole[cut:]


async def test_a_document_that_is_cut_short_ends_with_length(engine: DirectEngine) -> None:
    [whole] = await tokens_of(engine, BOUND[0])
    [rows] = await rows_of(engine, msgspec.structs.replace(BOUND[0], max_tokens=9))
    assert told(rows) == whole[:9]
    assert rows[-1].finish == "length"


async def test_without_stop_tokens_a_document_ends_with_the_models_own(
    engine: DirectEngine,
) -> None:
    [rows] = await rows_of(engine, msgspec.structs.replace(BOUND[0], stop_tokens=[]))
    check(rows)


async def test_a_stop_token_with_a_text_is_never_part_of_a_document(engine: DirectEngine) -> None:
    letter = token_id(TOKENIZER, "a")
    grammar = "start: /[ab]{40}/"
    [rows] = await rows_of(engine, bound(1, grammar, stop_tokens=[letter, STOP]))
    *document, last = told(rows)
    assert rows[-1].finish == "stop"
    assert last in (letter, STOP)
    assert letter not in document
    assert len(text_of(document)) == 40


async def test_a_grammar_names_special_tokens_by_their_ids(engine: DirectEngine) -> None:
    header = token_id(TOKENIZER, "<|start_header_id|>")
    [rows] = await rows_of(engine, bound(1, f'start: "call" <[{header}]> /[0-9]/ <[{STOP}]>'))
    tokens = told(rows)
    assert header in tokens
    assert text_of(tokens[: tokens.index(header)]) == "call"
    assert tokens[-1] == STOP


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: /[a-/", "cannot be used"),
        ("start: missing", "missing"),
        (grammar_of({"type": "string", "pattern": "(?=a)b"}), "cannot be used"),
        (grammar_of({"type": "never"}), "never"),
    ],
)
async def test_a_grammar_that_does_not_compile_fails_its_request_alone(
    engine: DirectEngine, grammar: str, message: str
) -> None:
    expected = await tokens_of(engine, BOUND[0], FREE[0])
    with engine.generate([bound(1, grammar)]) as bad:
        assert await tokens_of(engine, BOUND[0], FREE[0]) == expected
        with pytest.raises(EngineFailed, match=message):
            async for _ in bad.rows():
                pass
    assert await tokens_of(engine, BOUND[0], FREE[0]) == expected


async def test_a_constraint_that_leaves_no_token_fails_its_request_alone(
    engine: DirectEngine,
) -> None:
    stops = [i for i, piece in vocabulary_texts() if piece.startswith("q")]
    stuck = bound(1, 'start: /[0-9]{5}/ "qq"', stop_tokens=stops)
    expected = await tokens_of(engine, BOUND[0], FREE[0])
    with engine.generate([stuck]) as stream:
        assert await tokens_of(engine, BOUND[0], FREE[0]) == expected
        with pytest.raises(EngineFailed, match="no token"):
            async for _ in stream.rows():
                pass


def test_what_goes_wrong_with_one_mask_leaves_the_others_as_they_were(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(self: Constraint, words: object, matcher: object) -> None:
        if self is broken:
            raise Panic("the parser lost its way")
        put_stops(self, words, matcher)

    put_stops = Constraint.put_stops
    vocabulary = Vocabulary(model, TOKENIZER.get_vocab_size())
    grammar = Grammar(vocabulary, WORDS % 40)
    stops = frozenset(vocabulary.ends)
    said = TOKENIZER.encode("abc", add_special_tokens=False).ids
    broken, whole = (Constraint(grammar, stops, said) for _ in range(2))
    expected = Masker(1).compute([Asked(0, Constraint(grammar, stops, said), said)])
    monkeypatch.setattr(Constraint, "put_stops", panic)
    allowed = Masker(1).compute(
        [Asked(0, broken, broken.take_new()), Asked(1, whole, whole.take_new())]
    )
    assert (expected.rows, allowed.rows) == ([0], [1])
    assert np.array_equal(allowed.words, expected.words)
    assert "lost its way" in allowed.problems[0]


class Panic(BaseException):
    """What a panic in Rust becomes."""


def vocabulary_texts() -> list[tuple[int, str]]:
    return [(i, TOKENIZER.decode([i])) for i in range(TOKENIZER.get_vocab_size())]


async def test_a_folder_without_a_tokenizer_refuses_constraints_only(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "bare")
    (path / "tokenizer.json").unlink()
    async with started(path) as engine:
        with pytest.raises(EngineFailed, match=r"tokenizer\.json"):
            await rows_of(engine, BOUND[0])
        assert len((await tokens_of(engine, FREE[0]))[0]) == 60


async def test_a_document_that_gives_up_its_place_comes_out_the_same(model: Path) -> None:
    long = [bound(i, WORDS % 900, max_tokens=400 + 10 * i) for i in range(6)]
    async with started(model) as engine:
        expected = await tokens_of(engine, *long, *BOUND)
    cost = Backend(model, LoadOptions(), DeviceMemory("50%", None)).kv_cost
    async with started(model, kv_limit=cost.bytes(3, 300)) as engine:
        assert await tokens_of(engine, *long, *BOUND) == expected
        await idle(engine)
        stats = engine.stats
        assert stats is not None
        assert stats.preempted > 0


async def test_documents_survive_a_device_that_fails(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "frail", context=1024)
    (path / "frail.py").write_text(FAILS_ON_FIVE_ROWS)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_file": "frail.py"}))
    requests = [*BOUND, *FREE]
    async with started(path, trust_remote_code=True, max_batch=4) as engine:
        expected = await tokens_of(engine, *requests)
    async with started(
        path, steps_may_fail=True, trust_remote_code=True, kv_limit=4 << 20
    ) as engine:
        assert await tokens_of(engine, *requests) == expected


FAILS_ON_FIVE_ROWS = """
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def __call__(self, inputs, cache=None, **more):
        if inputs.shape[0] > 4 and inputs.shape[1] == 1 and self.tired():
            raise RuntimeError("[malloc] Unable to allocate 1234 bytes.")
        return super().__call__(inputs, cache, **more)

    steps = 0

    def tired(self):
        Model.steps += 1
        return Model.steps > 20
"""


# where the tokens are drawn


def scheduled(path: Path, first: list[Generate], late: list[Generate]) -> dict[int, list[int]]:
    """The tokens of all requests by place; `late` ones come when the first have begun."""
    memory = DeviceMemory("50%", None)
    backend = Backend(path, LoadOptions(), memory)
    cache = PrefixCache(backend.layout, 0)
    scheduler = Scheduler(backend, memory, cache, max_batch=16, kv_limit=1 << 28, prefill_chunk=64)
    requests = [msgspec.structs.replace(one, id=i) for i, one in enumerate([*first, *late])]
    tokens: dict[int, list[int]] = {one.id: [] for one in requests}
    for one in requests[: len(first)]:
        assert scheduler.add(one) is None
    waiting = requests[len(first) :]
    while scheduler.busy or waiting:
        for message in scheduler.turn():
            assert not isinstance(message, Failed)
            for row in message.rows if isinstance(message, Tokens) else ():
                tokens[row.id] += row.tokens
        if waiting and all(tokens[one.id] for one in requests[: len(first)]):
            for one in waiting:
                assert scheduler.add(one) is None
            waiting = []
    scheduler.close()
    return tokens


def test_device_and_host_draw_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "tiny", hidden=128)
    late = [
        *FREE[1:],
        *BOUND[3:],
        msgspec.structs.replace(BOUND[0], prompt=[(7 * i) % 400 for i in range(600)]),
    ]
    drawn = []
    for on_host in (True, False):
        monkeypatch.setattr(sampling, "_on_host", lambda on_host=on_host: on_host)
        drawn.append(scheduled(path, [*BOUND[:3], FREE[0]], late))
    assert drawn[0] == drawn[1]
    monkeypatch.undo()
    assert [scheduled(path, [one], [])[0] for one in BOUND[:3]] == list(drawn[0].values())[:3]


class RowState:
    def __init__(self, settings: Sampling) -> None:
        self.sampling = settings
        self.prompt, self.completion = [1, 2, 3], [4, 4]
        self.in_flight, self.position = False, 2


SETTINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(top_k=3),
    Sampling(top_p=0.7),
    Sampling(min_p=0.3),
    Sampling(top_k=40, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(logit_bias={5: 100.0, 6: 100.0}),
]


@pytest.mark.parametrize("kind", [DeviceSampler, HostSampler])
def test_forbidden_tokens_have_no_part_in_any_setting(kind: type) -> None:
    generator, vocab = np.random.default_rng(1), 203
    rows = [RowState(one) for one in SETTINGS]
    for round_ in range(40):
        bits = generator.random((len(rows), 7 * 32)) < (0.5, 0.02)[round_ % 2]
        bits[:, [7, 8]] = True
        bits[:, [5, 6]] = False
        words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
        constrained = [i for i in range(len(rows)) if (i + round_) % 3]
        allowed = Allowed(constrained, words[constrained], {}, {})
        logits = generator.normal(size=(len(rows), vocab)).astype(np.float32) * 4
        masked = np.where(bits[:, :vocab], logits, -np.inf)
        masked[[i for i in range(len(rows)) if i not in constrained]] = logits[
            [i for i in range(len(rows)) if i not in constrained]
        ]
        shares = generator.random(len(rows)).tolist()
        expected = draw(kind, rows, masked, shares, None)
        assert draw(kind, rows, logits, shares, allowed) == expected
        assert all(bits[i, expected[i]] for i in constrained)


def draw(
    kind: type, rows: list[RowState], logits: np.ndarray, shares: list[float], allowed: Any
) -> list[int]:
    sampler = kind(rows, mx.zeros(len(rows), dtype=mx.uint32), logits.shape[1])
    if kind is DeviceSampler:
        return list(sampler.sample(mx.array(logits), shares, allowed).tolist())
    tokens = mx.array([0] * len(rows), dtype=mx.uint32)
    sampler.sample(mx.array(logits), shares, tokens, allowed)
    return list(tokens.tolist())


def test_a_token_that_is_forced_is_known_as_such(model: Path) -> None:
    vocabulary = Vocabulary(model, TOKENIZER.get_vocab_size())
    letter = token_id(TOKENIZER, "a")
    forced = Constraint(Grammar(vocabulary, 'start: "a"'), frozenset({STOP}), [])
    free = Constraint(Grammar(vocabulary, "start: /[ab]/"), frozenset({STOP}), [])
    masker = Masker(1)
    allowed = masker.compute([Asked(2, forced, []), Asked(5, free, [])])
    assert allowed.rows == [2, 5]
    assert allowed.forced == {2: letter}
    allowed = masker.compute([Asked(2, forced, [letter]), Asked(5, free, [letter])])
    assert allowed.forced == {2: STOP, 5: STOP}
    assert {row: ids.tolist() for row, ids in allowed.choices(vocabulary.size).items()} == {
        2: [STOP],
        5: [STOP],
    }
