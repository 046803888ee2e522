"""Guessed tokens that are verified in the batch change no text."""

import random
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.utils import load_model

from mlx_server.engine.cache.rows import BatchKVCache
from mlx_server.engine.protocol import Generate, Sampling
from mlx_server.engine.run.batch import Batch
from mlx_server.engine.run.lookup import MOST, Experience, Forced, Lookup
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.verify import Guesses, Verified
from mlx_server.engine.schedule.planner import Planner
from mlx_server.engine.schedule.scheduler import Scheduler
from mlx_server.engine.sequence import Sequence
from tests.engine.conftest import request
from tests.engine.test_architectures import NEAR, USUALLY_NEAR, assert_right, prompt_of
from tests.engine.test_architectures import scheduler_of as arranged
from tests.engine.test_grammar import bound, grammar_of
from tests.engine.test_mixed import GREEDY, scheduler_of, tokens_of
from tests.support.architectures import ARCHITECTURES, VOCAB_SIZE, build_architecture
from tests.support.tiny import build_tiny_model


def test_the_next_turn_finds_no_rejected_token_in_the_prefix_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = requests_of(8)

    def both_turns(scheduler: Scheduler) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        first = tokens_of(scheduler, wanted, [])
        longer = [
            msgspec.structs.replace(one, prompt=one.prompt + first[i])
            for i, one in enumerate(wanted)
        ]
        return first, tokens_of(scheduler, longer, [])

    plain = both_turns(scheduler_of(path))
    oracle = Oracle(plain[0])
    scheduler = scheduler_of(path, prefixes=1 << 26, speculation="auto")
    monkeypatch.setattr(Batch, "guesses", lambda batch, most: oracle.guesses(batch, most))
    monkeypatch.setattr(Planner, "_guesses", always)
    assert both_turns(scheduler) == plain
    assert scheduler.counts.cached_tokens > 100
    assert oracle.wrong > 16


FORM = grammar_of(
    {
        "type": "object",
        "properties": {
            f"the_long_name_of_field_{i}": {"type": "integer", "minimum": 0, "maximum": 9}
            for i in range(5)
        },
        "required": [f"the_long_name_of_field_{i}" for i in range(5)],
        "additionalProperties": False,
    }
)


def requests_of(count: int) -> list[Generate]:
    """Greedy and sampled, penalised, with and without log-probabilities."""
    made = []
    for seed in range(count):
        sampling = Sampling(
            seed=seed,
            temperature=[0.0, 0.3, 0.9][seed % 3],
            repetition_penalty=[1.0, 1.0, 1.1][seed // 3 % 3],
            presence_penalty=[0.0, 0.4][seed // 2 % 2],
        )
        prompt = [(7 * i + seed) % 400 for i in range(20 + 31 * seed % 150)]
        made.append(request(prompt, 40 + seed, sampling, logprobs=[None, 2][seed % 2]))
    return made


class Oracle:
    """Guesses the `texts` that are to come, up to a mistake."""

    def __init__(self, texts: dict[int, list[int]], vocabulary: int = 400) -> None:
        self.texts = texts
        self.vocabulary = vocabulary
        self.right = self.wrong = 0

    def guesses(self, batch: Batch, most: Mapping[int, int]) -> dict[int, list[int]]:
        found = {}
        for row in batch.rows:
            at = len(row.completion)
            rng = random.Random(1000 * row.id + at)
            right = rng.randrange(5)
            coming = self.texts[row.id][at : at + right]
            guess = [*coming, *(rng.randrange(self.vocabulary) for _ in range(rng.randrange(3)))]
            guess = guess[: row.limit - at - 1]
            if guess and rng.random() < 0.7:
                found[row.id] = guess
                self.right += len(coming[: len(guess)])
                self.wrong += len(guess) - len(coming[: len(guess)])
        return found


def always(planner: Planner, rows: list[Sequence]) -> dict[int, int]:
    return {row.id: MOST for row in rows if row.guesser is not None}


@pytest.mark.parametrize(
    ("kv_bits", "count"), [(None, 12), (8, 6), pytest.param(None, 100, marks=pytest.mark.soak)]
)
def test_guesses_right_and_wrong_change_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_bits: int | None, count: int
) -> None:
    path = build_tiny_model(tmp_path / "tiny", hidden=128)
    scheduler = scheduler_of(path, kv_bits=kv_bits, speculation="auto")
    wanted, half = requests_of(count), count // 2
    plain = tokens_of(scheduler, wanted[:half], wanted[half:])
    oracle = Oracle(plain)
    monkeypatch.setattr(Batch, "guesses", lambda batch, most: oracle.guesses(batch, most))
    monkeypatch.setattr(Planner, "_guesses", always)
    beside = 0
    verify = Batch.verify

    def counting(batch: Batch, guesses: Guesses, *chunk: Part) -> Verified:
        nonlocal beside
        beside += len(chunk)
        return verify(batch, guesses, *chunk)

    monkeypatch.setattr(Batch, "verify", counting)
    assert tokens_of(scheduler, wanted[:half], wanted[half:]) == plain
    assert beside > 3, "chunks of prompts shared the pass"
    assert oracle.right > 10 * count
    assert oracle.wrong > 2 * count


@pytest.mark.parametrize("mistaken", [False, True])
def test_forced_text_is_guessed_and_changes_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistaken: bool
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = [bound(seed, FORM, 120) for seed in range(6)] + requests_of(4)
    scheduler = scheduler_of(path, speculation="off")
    plain = tokens_of(scheduler, wanted, [])
    scheduler.close()
    monkeypatch.setattr(Planner, "_guesses", always)
    right = Forced.guess
    if mistaken:  # by tokens that the grammar allows and by others
        monkeypatch.setattr(
            Forced, "guess", lambda one, most: [*right(one, most)[:3], 3 + most, 9][:most]
        )
    guessing = scheduler_of(path, speculation="auto")
    assert tokens_of(guessing, wanted, []) == plain
    assert guessing.counts.accepted > 60
    assert guessing.counts.guessed > guessing.counts.accepted or not mistaken
    guessing.close()


def test_what_came_before_is_guessed_under_a_grammar_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = [bound(seed, "start: /[a-z ]{60,80}/", 60) for seed in range(3)]
    scheduler = scheduler_of(path, speculation="off")
    plain = tokens_of(scheduler, wanted, [])
    scheduler.close()
    foreseen = [
        msgspec.structs.replace(one, prediction=[*plain[i][:20], 5, *plain[i][20:]])
        for i, one in enumerate(wanted)
    ]
    monkeypatch.setattr(Planner, "_guesses", always)
    guessing = scheduler_of(path, speculation="auto")
    assert tokens_of(guessing, foreseen, []) == plain
    assert guessing.counts.accepted > 40
    guessing.close()


SHORT = ("gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_5")
"""Windows beside whole caches, windows with sinks, compressed keys, recurrent states."""


OTHERWISE = ("plamo3",)
"""Masks one token more than its cache keeps: in mlx-lm too its text depends on what is computed
together.
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHORT else pytest.mark.soak)
        for name in ARCHITECTURES
        if name not in OTHERWISE
    ],
)
def test_guesses_change_no_text_of_any_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = build_architecture(tmp_path / name, name)
    reference, _ = load_model(folder)
    rng = random.Random(6)
    prompts = [prompt_of(rng, length) for length in (3, 41, 70, 18)]
    scheduler = arranged(folder, speculation="auto")
    wanted = [Generate(i, prompt, GREEDY, 48) for i, prompt in enumerate(prompts)]
    oracle = Oracle(tokens_of(scheduler, wanted, []), VOCAB_SIZE)
    monkeypatch.setattr(Batch, "guesses", lambda batch, most: oracle.guesses(batch, most))
    monkeypatch.setattr(Planner, "_guesses", always)
    told = tokens_of(scheduler, wanted, [])
    assert (oracle.right > 40 and oracle.wrong > 20) == scheduler.model.guesses
    for prompt, answer in zip(prompts, told.values(), strict=True):
        assert_right(reference, prompt, answer, NEAR.get(name, USUALLY_NEAR))


def test_rows_that_only_share_passes_at_equal_length_take_no_guesses(tmp_path: Path) -> None:
    path = build_architecture(tmp_path / "internlm3", "internlm3")
    assert not scheduler_of(path, speculation="auto").model.guesses


@pytest.mark.parametrize("window", [None, 6])
def test_attention_passes_over_gaps_as_if_they_were_closed(window: int | None) -> None:
    cache = BatchKVCache([0, 2])
    cache.update_and_fetch(mx.zeros((2, 1, 12, 4)), mx.zeros((2, 1, 12, 4)))
    cache.roll_back([1, 4])
    cache.update_and_fetch(mx.zeros((2, 1, 3, 4)), mx.zeros((2, 1, 3, 4)))
    cache.roll_back([2, 0])
    open_, offsets = cache.make_mask(2, window_size=window), cache.offset.tolist()
    own = [[0, *range(1, 11), 11, 14, 15], [*range(2, 8), 11, 12, 13, 14, 15]]
    cache.close_gaps()
    closed = cache.make_mask(2, window_size=window)
    assert offsets == cache.offset.tolist() == [12, 9]
    assert isinstance(open_, mx.array)
    assert isinstance(closed, mx.array)
    for row, places in enumerate(own):
        seen = open_[row, 0][:, mx.array(places)]
        assert seen.sum().item() == open_[row].sum().item(), "none but its own"
        assert seen.tolist() == closed[row, 0][:, -len(places) :].tolist()


def test_a_row_that_forgets_more_than_follows_its_last_gap_forgets_its_own_tokens() -> None:
    cache = BatchKVCache([0, 0])
    tokens = mx.arange(12.0).reshape(1, 1, 12, 1)
    cache.update_and_fetch(mx.repeat(tokens, 2, 0), mx.repeat(tokens, 2, 0))
    cache.roll_back([3, 0])
    cache.roll_back([2, 1])
    new = mx.full((2, 1, 2, 1), 50.0)
    cache.update_and_fetch(new, new)
    cache.roll_back([1, 0])
    cache.roll_back([0, 3])
    cache.close_gaps()
    held = [
        cache.keys[row, 0, padding : cache._idx, 0] for row, padding in enumerate(cache.padding)
    ]
    assert [row.tolist() for row in held] == [[*range(7), 50], [*range(10)]]


def test_what_followed_the_same_tokens_before_is_guessed() -> None:
    lookup = Lookup(Experience(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])
    lookup.index(3)
    lookup.index(100)
    lookup.append(4)
    assert lookup.guess(3) == [5, 6, 7]
    lookup.append(5)
    assert lookup.guess(3) == [6, 7, 8]
    lookup.append(99)
    assert not lookup.ready


def test_a_prediction_is_guessed_from_its_beginning_on() -> None:
    lookup = Lookup(Experience(), [1, 2, 3], [50, 51, 52, 53, 54, 55])
    assert lookup.guess(2) == [50, 51]
    lookup.append(50)
    assert lookup.guess(2) == [51, 52]


def test_what_a_request_may_hope_of_guesses_shows_without_any() -> None:
    experience = Experience()
    lookup = Lookup(experience, [1, 2, 3, 4] * 4)
    lookup.index(100)
    hoped = lookup.chances
    for token in [1, 2, 3, 4] * 8:
        lookup.append(token)
    assert min(lookup.chances) > max(hoped)
    assert Lookup(experience, []).chances > hoped, "so do those after it"
    for token in range(100, 140):
        for one in (1, 2, 3, 4, token):
            lookup.append(one)
    right_at_once, then = lookup.chances
    assert right_at_once < 0.3 < then, "a place found anew, and one that was right before"
