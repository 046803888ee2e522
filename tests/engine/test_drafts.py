"""A draft model that guesses changes no text, and is refused where its tokens are others."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.loading import load_draft
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import Generate, LoadOptions
from mlx_server.engine.run import drafts, patches
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.drafted import FAILURES, Drafted
from mlx_server.engine.run.drafts import Drafts
from mlx_server.engine.run.lookup import Experience, Forced, Lookup
from mlx_server.engine.run.weights import ModelError
from mlx_server.engine.schedule.guessing import Chance, Guessing
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.engine.conftest import request
from tests.engine.test_grammar import bound
from tests.engine.test_guesses import FORM, requests_of
from tests.engine.test_mixed import scheduler_of, tokens_of
from tests.support.architectures import build_architecture
from tests.support.tiny import build_recurrent_model, build_tiny_model

KV_LIMIT = 1 << 28


def drafted_of(
    path: Path, draft: Path, *, prefixes: int = 0, kv_limit: int = KV_LIMIT, **options: Any
) -> Scheduler:
    """As `scheduler_of`, with a draft model."""
    memory, given = DeviceMemory("50%", None), LoadOptions(speculation="auto", **options)
    backend = Backend(path, given, memory)
    return Scheduler(
        backend,
        memory,
        PrefixCache(backend.layout, prefixes),
        max_batch=16,
        kv_limit=kv_limit,
        prefill_chunk=64,
        draft=load_draft(draft, backend, given, memory),
    )


def drafts_of(scheduler: Scheduler) -> Drafts:
    assert scheduler.runner.drafts is not None
    return scheduler.runner.drafts


def longer(requests: list[Generate], tokens: int = 80) -> list[Generate]:
    return [msgspec.structs.replace(one, max_tokens=tokens) for one in requests]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess as much as can be guessed, each row another number of tokens."""

    def everything(_: Guessing, rows: list[int], chances: Mapping[int, Chance]) -> dict[int, int]:
        return {id_: 1 + id_ % one.most for id_, one in chances.items()}

    monkeypatch.setattr(Guessing, "allot", everything)


@pytest.fixture
def alone(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft makes all guesses."""
    monkeypatch.setattr(Lookup, "ready", 0)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("seed", [0, 1], ids=["of the same weights", "of others"])
def test_what_a_draft_guesses_changes_no_text(
    tmp_path: Path, seed: int, kv_bits: int | None
) -> None:
    path = build_tiny_model(tmp_path / "tiny", hidden=128)
    draft = build_tiny_model(tmp_path / "draft", hidden=128, seed=seed)
    wanted = longer(requests_of(8), 70)
    plain = tokens_of(scheduler_of(path, kv_bits=kv_bits), wanted[:4], wanted[4:])
    scheduler = drafted_of(path, draft, kv_bits=kv_bits)
    assert tokens_of(scheduler, wanted[:4], wanted[4:]) == plain
    counts = scheduler.counts
    assert counts.guessed > 100
    if seed == 0:  # it draws with the same uniforms, penalties and filters
        assert counts.accepted > 0.97 * counts.guessed
    else:
        assert counts.accepted < 0.1 * counts.guessed, "and mistakes do no harm"
    scheduler.release()
    assert drafts_of(scheduler).nbytes == 0


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("mixing", ["neither", "the model alone"])
def test_models_that_cannot_mix_caches_in_a_pass_draft_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixing: str
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = longer(requests_of(6))
    plain = tokens_of(scheduler_of(path), wanted, [])
    tries = iter([None, "cannot"] if mixing == "the model alone" else ["cannot", "cannot"])
    enable = patches.enable_mixed_passes
    monkeypatch.setattr(
        patches, "enable_mixed_passes", lambda *given: next(tries) or enable(*given)
    )
    scheduler = drafted_of(path, path)
    assert not drafts_of(scheduler).model.mixes
    assert scheduler.model.mixes == (mixing == "the model alone")
    assert scheduler.room._padded([10, 600, 2000]) == [2000] * 3, "as the draft pads them"
    assert tokens_of(scheduler, wanted, []) == plain
    assert scheduler.counts.accepted > 0.97 * scheduler.counts.guessed > 100


@pytest.mark.usefixtures("always")
def test_lookup_and_grammars_guess_beside_a_draft(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    draft = build_tiny_model(tmp_path / "draft", seed=1)
    repeating = [request([7, 8, 9, 10, 11, 12] * 9, 100)]
    wanted = [*(bound(seed, FORM, 120) for seed in range(4)), *longer(requests_of(4)), *repeating]
    plain_scheduler = scheduler_of(path)
    plain = tokens_of(plain_scheduler, wanted, [])
    plain_scheduler.close()
    scheduler = drafted_of(path, draft)
    assert tokens_of(scheduler, wanted, []) == plain
    assert scheduler.counts.accepted > 50, "forced text"
    scheduler.close()


@pytest.mark.usefixtures("alone")
def test_the_next_turn_of_a_chat_finds_what_the_draft_has_computed(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = [request([(7 * i) % 400 for i in range(100)], 200)]
    scheduler = drafted_of(path, path, prefixes=1 << 26)
    first = tokens_of(scheduler, wanted, [])
    next_turn = msgspec.structs.replace(wanted[0], prompt=wanted[0].prompt + first[0])
    computed: list[int] = []
    prefill = Backend.prefill
    drafting = drafts_of(scheduler).model

    def counted(model: Backend, tokens: Any, cache: Any) -> None:
        if model is drafting:
            computed.append(tokens.size)
        prefill(model, tokens, cache)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Backend, "prefill", counted)
        guessed = scheduler.counts.guessed
        tokens_of(scheduler, [next_turn], [])
    assert scheduler.counts.guessed > guessed + 50
    assert sum(computed) < 64


@pytest.mark.usefixtures("alone")
def test_the_drafts_prefix_cache_holds_no_rejected_token(tmp_path: Path) -> None:
    """A draft of the same weights agrees with the model only as long as its caches are right."""
    path = build_tiny_model(tmp_path / "tiny")
    wanted = longer(requests_of(6), 70)
    scheduler = drafted_of(path, path, prefixes=1 << 26)
    draw = drafts.draw

    def mistaken(*given: Any) -> list[list[int]]:
        return [[*some, last ^ (last % 3 == 0)] for *some, last in draw(*given)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drafts, "draw", mistaken)
        first = tokens_of(scheduler, wanted, [])
    assert scheduler.counts.guessed > 1.2 * scheduler.counts.accepted
    scheduler.counts.guessed = scheduler.counts.accepted = 0
    turns = [
        msgspec.structs.replace(one, prompt=one.prompt + first[i]) for i, one in enumerate(wanted)
    ]
    plain = tokens_of(scheduler_of(path), turns, [])
    assert tokens_of(scheduler, turns, []) == plain
    assert scheduler.counts.accepted > 0.97 * scheduler.counts.guessed > 100


@pytest.mark.usefixtures("alone")
def test_a_turn_that_fails_in_the_draft_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = longer(requests_of(4), 60)
    plain = tokens_of(scheduler_of(path), wanted, [])
    scheduler = drafted_of(path, path)
    broken = iter(range(100))
    right = Drafts._step

    def fails(drafts: Drafts, *given: Any) -> Any:
        if next(broken) in (3, 4, 30):
            raise RuntimeError("the device is out of memory")
        return right(drafts, *given)

    monkeypatch.setattr(Drafts, "_step", fails)
    assert tokens_despite_failures(scheduler, wanted) == (plain, 3)


def tokens_despite_failures(
    scheduler: Scheduler, requests: list[Generate]
) -> tuple[dict[int, list[int]], int]:
    """What they are told by their places, none being given up, and how many turns failed."""
    told: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    for i, one in enumerate(requests):
        scheduler.add(msgspec.structs.replace(one, id=i, caller=str(i)))
    failures, given_up = 0, []
    while scheduler.busy:
        try:
            for message in scheduler.turn():
                for row in getattr(message, "rows", ()):
                    told[row.id] += row.tokens
        except RuntimeError as error:
            failures += 1
            given_up += scheduler.recover(error)
    assert not given_up
    return told, failures


@pytest.mark.usefixtures("alone")
def test_requests_that_leave_take_their_rows_of_the_draft_with_them(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    scheduler = drafted_of(path, path)
    for i, one in enumerate(longer(requests_of(4), 400)):
        scheduler.add(msgspec.structs.replace(one, id=i, caller=str(i)))
    drafts = drafts_of(scheduler)
    while not all(drafts.held(i) for i in range(4)):
        assert list(scheduler.turn())
    scheduler.abort([0, 2])
    list(scheduler.turn())
    assert [bool(drafts.held(i)) for i in range(4)] == [False, True, False, True]
    scheduler.abort([1, 3])
    list(scheduler.turn())
    assert drafts.nbytes == 0


@pytest.mark.usefixtures("alone")
def test_caches_of_both_models_stay_within_the_limit(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wanted = longer(requests_of(8), 100)
    plain = tokens_of(scheduler_of(path), wanted, [])
    limit = scheduler_of(path).model.kv_cost.bytes(6, 300)
    scheduler = drafted_of(path, path, prefixes=limit, kv_limit=limit)
    for i, one in enumerate(wanted):
        scheduler.add(msgspec.structs.replace(one, id=i, caller=str(i)))
    told: dict[int, list[int]] = {i: [] for i in range(8)}
    most = 0
    while scheduler.busy:
        for message in scheduler.turn():
            for row in getattr(message, "rows", ()):
                told[row.id] += row.tokens
        most = max(most, scheduler.runner.kv_bytes + scheduler.runner.prefix_bytes)
    assert told == plain
    assert scheduler.counts.guessed > 100
    assert most <= limit


@pytest.mark.usefixtures("alone")
def test_a_draft_of_a_shorter_context_guesses_as_far_as_that(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    short = build_tiny_model(tmp_path / "short", context=128)
    wanted = [request(range(40), 300)]
    scheduler = drafted_of(path, short)
    plain = tokens_of(scheduler_of(path), wanted, [])
    assert tokens_of(scheduler, wanted, []) == plain
    assert 30 < scheduler.counts.accepted < 60, "one of two tokens, up to there"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("padded", ["the draft", "the model"])
def test_the_same_vocabulary_may_be_padded_otherwise(tmp_path: Path, padded: str) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    wide = build_tiny_model(tmp_path / "wide")
    _pad_vocabulary(wide, 64)
    wanted = [request(range(seed, 40), 80) for seed in range(4)]
    pair = (path, wide) if padded == "the draft" else (wide, path)
    plain = tokens_of(scheduler_of(pair[0]), wanted, [])
    scheduler = drafted_of(*pair)
    assert tokens_of(scheduler, wanted, []) == plain
    assert scheduler.counts.accepted > 0.97 * scheduler.counts.guessed > 80


def _pad_vocabulary(path: Path, more: int) -> None:
    """Add tokens that no tokenizer has, and that are never the likeliest."""
    file = str(path / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = mx.pad(weights[name], [(0, more), (0, 0)])
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    config = json.loads((path / "config.json").read_text())
    config["vocab_size"] += more
    (path / "config.json").write_text(json.dumps(config))


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    more = build_tiny_model(tmp_path / "more", extra_tokens=["<think>"])
    with pytest.raises(ModelError, match=r"vocabularies differ: one has .* tokens, the other"):
        drafted_of(path, more)
    other = build_tiny_model(tmp_path / "other")
    _swap_two_pieces(other / "tokenizer.json")
    with pytest.raises(ModelError, match=r"vocabularies differ: token \d+ is '.*' in one"):
        drafted_of(path, other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"only one of their folders has a readable tokenizer"):
        drafted_of(path, other)


def _swap_two_pieces(file: Path) -> None:
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[100:102]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(content))


def test_a_draft_is_refused_where_caches_cannot_be_shortened(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "tiny")
    recurrent = build_recurrent_model(tmp_path / "recurrent")
    with pytest.raises(ModelError, match="the draft's KV caches cannot be shortened"):
        drafted_of(path, recurrent)
    with pytest.raises(ModelError, match="its own KV caches cannot be shortened"):
        drafted_of(build_architecture(tmp_path / "internlm3", "internlm3"), path)


def test_a_text_that_came_before_is_guessed_before_a_draft_does() -> None:
    forced = bound_guesser()
    drafted = ready_draft(forced)
    assert drafted.drafts
    forced.begin([5, 6])
    assert not drafted.drafts
    assert drafted.guess(2) == [5, 6]
    for token in range(10, 16):
        forced.begin([5, 6])
        drafted.append(token)
    forced.begin([5, 6])
    assert drafted.drafts, "a source that fails gives way"


def test_a_draft_that_is_always_wrong_pauses_ever_longer() -> None:
    drafted, asked = ready_draft(bound_guesser()), []
    rng = random.Random(1)
    for step in range(600):
        if drafted.drafts:
            asked.append(step)
            assert drafted.guess(4) == []
            drafted.judge(4, 0)
        drafted.append(rng.randrange(50))
        drafted.behind = 1
    assert asked[:FAILURES] == [*range(FAILURES)]
    assert len(asked) < 15


def test_a_draft_stops_at_a_token_that_it_does_not_know() -> None:
    drafted = ready_draft(bound_guesser())
    drafted.append(50)
    assert not drafted.drafts
    assert not Drafted(bound_guesser(), [1, 99], 1000, 50).wanted


def bound_guesser() -> Forced:
    experience = Experience()
    return Forced(experience, Lookup(experience, []))


def ready_draft(own: Forced) -> Drafted:
    drafted = Drafted(own, [1, 2, 3], longest=1000, vocabulary=50)
    drafted.behind = 1
    return drafted
