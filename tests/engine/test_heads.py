"""A head of the model's own that guesses changes no text, and guesses well where it can."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx.utils import tree_flatten

from mlx_server.dimensions import HEADED as FAMILIES
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling
from mlx_server.engine.run import drafted
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.drafts import Drafts
from mlx_server.engine.run.heads.guesses import Heads, Read
from mlx_server.engine.run.heads.head import KINDS, Head
from mlx_server.engine.run.heads.unread import HELD, Unread
from mlx_server.engine.run.lookup import Lookup
from mlx_server.engine.schedule.guessing import Chance, Guessing
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.engine.conftest import request
from tests.engine.test_drafts import drafted_of, tokens_despite_failures
from tests.engine.test_guesses import requests_of
from tests.engine.test_mixed import scheduler_of, tokens_of
from tests.support.architectures import VOCAB_SIZE, build_architecture
from tests.support.heads import HEADED, build_headed
from tests.support.layer_heads import LAYERED

FORGIVING = 1 << 30
QUICK = ("deepseek_v3", "mimo", "qwen3_5", "qwen3_next")
"""With experts and without, of models that mix passes and that do not, and have states or not."""


def families(*further: str) -> list[Any]:
    quick = (*QUICK, *further)
    return [pytest.param(n, marks=() if n in quick else pytest.mark.soak) for n in HEADED]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head makes all guesses, as many as it can, for each row another number of tokens."""

    def everything(_: Guessing, rows: list[int], chances: Mapping[int, Chance]) -> dict[int, int]:
        return {id_: 1 + id_ % one.most for id_, one in chances.items()}

    monkeypatch.setattr(Guessing, "allot", everything)
    monkeypatch.setattr(Lookup, "ready", 0)
    monkeypatch.setattr(drafted, "FAILURES", FORGIVING)


def wanted(count: int, tokens: int = 50) -> list[Generate]:
    """Some begin late, some end soon."""
    return [
        msgspec.structs.replace(
            one,
            prompt=[token % VOCAB_SIZE for token in one.prompt],
            max_tokens=tokens - 7 * (place % 4),
        )
        for place, one in enumerate(requests_of(count))
    ]


def heads_of(scheduler: Scheduler) -> Heads:
    assert isinstance(scheduler.runner.drafts, Heads)
    return scheduler.runner.drafts


def backend_of(path: Path, **options: Any) -> Backend:
    given = LoadOptions(**{"speculation": "auto"} | options)
    return Backend(path, given, DeviceMemory("50%", None))


def head_of(path: Path, **options: Any) -> Head:
    head = backend_of(path, **options).head
    assert head is not None
    return head


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("name", "agreeing"),
    [
        *(pytest.param(*one.values, False, marks=one.marks) for one in families()),
        *(
            pytest.param(name, True, marks=() if name == "qwen3_5" else pytest.mark.soak)
            for name in HEADED
        ),
    ],
)
def test_what_a_head_guesses_changes_no_text(tmp_path: Path, name: str, agreeing: bool) -> None:
    path = build_headed(tmp_path / name, name, agreeing=agreeing)
    requests = wanted(8)
    plain = tokens_of(scheduler_of(path), requests[:4], requests[4:])
    scheduler = scheduler_of(path, speculation="auto")
    assert tokens_of(scheduler, requests[:4], requests[4:]) == plain
    counts = scheduler.counts
    assert counts.guessed > 100
    if agreeing:  # it draws with the same uniforms, penalties and filters
        assert counts.accepted > 0.95 * counts.guessed
    else:
        assert counts.accepted < 0.2 * counts.guessed, "and mistakes do no harm"
    scheduler.release()
    assert scheduler.runner.kv_bytes == heads_of(scheduler).nbytes == 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", families("step3p5"))  # with a window, too
def test_a_head_reads_what_the_model_computed_and_nothing_that_it_guessed_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Rows come and go; the head's first logits are those of all its past computed at once."""
    path = build_headed(tmp_path / name, name, agreeing=False)
    scheduler = scheduler_of(path, speculation="auto")
    heads = heads_of(scheduler)
    found: list[tuple[list[int], mx.array]] = []
    feed = Heads._feed

    def noted(self: Heads, read: Read) -> mx.array:
        logits = feed(self, read)
        rows = {row.id: row for row in self._groups.rows}
        for id_, one in zip(read, logits, strict=True):
            if not rows[id_].behind:
                found.append((rows[id_].tokens(0), one))
        return logits

    monkeypatch.setattr(Heads, "_feed", noted)
    requests = [
        msgspec.structs.replace(one, prompt=one.prompt[: 30 + 8 * place])
        for place, one in enumerate(wanted(8, 40))
    ]
    tokens_of(scheduler, requests[:4], requests[4:])
    assert len(found) > 60
    head = heads._head
    for tokens, logits in found[::5]:
        states = head.trunk(mx.array([tokens]), scheduler.model.new_cache())
        out = head(mx.array([tokens[1:]]), states[:, :-1], head.new_cache())
        expected = head.project(out)[0, -1]
        assert mx.allclose(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("always")
def test_a_head_passes_over_what_it_has_not_seen_of_a_long_prompt(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    requests = [request([i % 90 for i in range(400)], 60, Sampling(seed=3))]
    plain = tokens_of(scheduler_of(path), requests, [])
    scheduler = scheduler_of(path, speculation="auto")
    assert tokens_of(scheduler, requests, []) == plain
    assert scheduler.counts.accepted > 25


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3", "mimo"])
def test_a_head_guesses_after_a_prefix_from_the_cache(tmp_path: Path, name: str) -> None:
    path = build_headed(tmp_path / name, name)
    first = [request([(7 * i) % 120 for i in range(100)], 50, Sampling(seed=1))]
    scheduler = scheduler_of(path, prefixes=1 << 26, speculation="auto")
    answer = tokens_of(scheduler, first, [])[0]
    turn = [msgspec.structs.replace(first[0], prompt=[*first[0].prompt, *answer, 5])]
    plain = tokens_of(scheduler_of(path), turn, [])
    before = scheduler.counts.accepted
    assert tokens_of(scheduler, turn, []) == plain
    assert scheduler.counts.cached_tokens > 90
    assert scheduler.counts.accepted > before + 20


@pytest.mark.usefixtures("always")
def test_a_head_guesses_up_to_the_end_of_the_context(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    requests = [request(range(40), 1000, Sampling(seed=seed)) for seed in range(3)]
    plain = tokens_of(scheduler_of(path, context_length=128), requests, [])
    scheduler = scheduler_of(path, speculation="auto", context_length=128)
    assert tokens_of(scheduler, requests, []) == plain
    assert {len(answer) for answer in plain.values()} == {88}
    assert scheduler.counts.accepted > 120


@pytest.mark.usefixtures("always")
def test_requests_that_leave_take_their_rows_of_the_head_with_them(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    scheduler = scheduler_of(path, speculation="auto")
    heads = heads_of(scheduler)
    for i in range(4):
        one = request(range(i, 40), 400, Sampling(seed=i), caller=str(i))
        scheduler.add(msgspec.structs.replace(one, id=i))
    while not all(heads.held(i) for i in range(4)):
        assert list(scheduler.turn())
    scheduler.abort([0, 2])
    list(scheduler.turn())
    assert [bool(heads.held(i)) for i in range(4)] == [False, True, False, True]
    scheduler.abort([1, 3])
    list(scheduler.turn())
    assert heads.nbytes == 0


@pytest.mark.usefixtures("always")
def test_a_turn_that_fails_in_the_head_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    requests = wanted(4)
    plain = tokens_of(scheduler_of(path), requests, [])
    scheduler = scheduler_of(path, speculation="auto")
    broken = iter(range(100))
    right = Heads._compute

    def fails(heads: Heads, *given: Any) -> Any:
        if next(broken) in (3, 9, 30):
            raise RuntimeError("the device is out of memory")
        return right(heads, *given)

    monkeypatch.setattr(Heads, "_compute", fails)
    assert tokens_despite_failures(scheduler, requests) == (plain, 3)


@pytest.mark.usefixtures("always")
def test_the_heads_caches_stay_within_the_limit(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    requests = wanted(8, 60)
    plain = tokens_of(scheduler_of(path), requests, [])
    limit = scheduler_of(path).model.kv_cost.bytes(4, 300)
    backend = backend_of(path)
    memory, prefix = DeviceMemory("50%", None), scheduler_of(path).runner.prefix
    scheduler = Scheduler(backend, memory, prefix, max_batch=16, kv_limit=limit, prefill_chunk=64)
    for i, one in enumerate(requests):
        scheduler.add(msgspec.structs.replace(one, id=i, caller=str(i)))
    told: dict[int, list[int]] = {i: [] for i in range(8)}
    most = 0
    while scheduler.busy:
        for message in scheduler.turn():
            for row in getattr(message, "rows", ()):
                told[row.id] += row.tokens
        most = max(most, scheduler.runner.kv_bytes)
    assert told == plain
    assert scheduler.counts.guessed > 100
    assert 0.3 * limit < most <= limit


@pytest.mark.parametrize("name", families(*LAYERED))
def test_a_head_as_the_makers_ship_it_is_that_of_a_conversion(tmp_path: Path, name: str) -> None:
    converted = build_headed(tmp_path / "converted", name, agreeing=False)
    raw = build_headed(tmp_path / "raw", name, agreeing=False, raw=True)
    ours, theirs = backend_of(converted), backend_of(raw)
    for one, other in ((ours.model, theirs.model), (ours.head, theirs.head)):
        mine = dict(tree_flatten(getattr(one, "model", one).parameters()))
        others = dict(tree_flatten(getattr(other, "model", other).parameters()))
        assert mine.keys() == others.keys()
        assert all(mx.allclose(mine[key], others[key], atol=1e-6) for key in mine)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dequantize", ["always", "never"])
@pytest.mark.parametrize("beginning", ["language_model", "language_model.m", "language_model.mtp"])
def test_a_head_may_be_quantized_or_not(tmp_path: Path, beginning: str, dequantize: str) -> None:
    path = build_headed(tmp_path / "tiny", "qwen3_5", quantized=beginning)
    requests = wanted(3)
    plain = tokens_of(scheduler_of(path, dequantize=dequantize), requests, [])
    scheduler = scheduler_of(path, speculation="auto", dequantize=dequantize)
    names = [name for name, _ in tree_flatten(heads_of(scheduler)._head.model.parameters())]
    assert any("scales" in name for name in names) == (dequantize == "never")
    assert tokens_of(scheduler, requests, []) == plain
    assert scheduler.counts.accepted > 0.9 * scheduler.counts.guessed > 40


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("beginning", ["model", "model.layers.4"])
def test_a_head_of_one_layer_more_may_be_quantized(tmp_path: Path, beginning: str) -> None:
    path = build_headed(tmp_path / "tiny", "deepseek_v3", quantized=beginning)
    requests = wanted(3, 40)
    plain = tokens_of(scheduler_of(path, dequantize="never"), requests, [])
    scheduler = scheduler_of(path, speculation="auto", dequantize="never")
    names = [name for name, _ in tree_flatten(heads_of(scheduler)._head.model.parameters())]
    assert {"eh_proj.scales", "layer.mlp.switch_mlp.up_proj.scales"} < set(names)
    assert tokens_of(scheduler, requests, []) == plain
    assert scheduler.counts.accepted > 0.9 * scheduler.counts.guessed > 30


@pytest.mark.parametrize("name", ["qwen3_5", "llama", "deepseek_v3", "ernie4_5_moe", "mimo"])
def test_a_model_without_a_head_guesses_as_ever(tmp_path: Path, name: str) -> None:
    backend = backend_of(build_architecture(tmp_path / name, name))
    assert backend.head is None
    assert backend.guesses


def test_a_head_is_left_out_where_nothing_is_to_be_guessed_by_it(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_next", "qwen3_next")
    assert backend_of(path, speculation="off").head is None
    assert backend_of(path, draft_path=str(path)).head is None
    shipped = build_headed(tmp_path / "deepseek_v3", "deepseek_v3", raw=True)
    assert backend_of(shipped, speculation="off").head is None


def test_a_draft_model_that_is_named_guesses_in_place_of_the_head(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    small = build_architecture(tmp_path / "llama", "llama")
    for folder in (path, small):
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    scheduler = drafted_of(path, small, draft_path=str(small))
    assert isinstance(scheduler.runner.drafts, Drafts)
    assert scheduler.model.head is None


def take_away(path: Path, name: str) -> None:
    """A weight of the model in this folder."""
    file = str(path / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    mx.eval(weights)
    del weights[name]
    mx.save_safetensors(file, weights)


def test_a_head_that_is_not_whole_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    take_away(path, "language_model.mtp.fc.weight")
    with caplog.at_level(logging.WARNING):
        assert backend_of(path).head is None
    assert "event=own_head_off reason='ValueError: Missing 1 parameters" in caplog.text


def test_a_head_without_one_of_its_experts_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = build_headed(tmp_path / "deepseek_v3", "deepseek_v3", raw=True)
    take_away(path, "model.layers.4.mlp.experts.2.up_proj.weight")
    with caplog.at_level(logging.WARNING):
        assert backend_of(path).head is None
    assert "event=own_head_off" in caplog.text
    assert "mlp.experts.2.up_proj" in caplog.text


def test_the_heads_memory_is_counted(tmp_path: Path) -> None:
    path = build_headed(tmp_path / "qwen3_5", "qwen3_5")
    scheduler = scheduler_of(path, speculation="auto")
    head, without = heads_of(scheduler)._head, scheduler_of(path)
    arrays = [array for _, array in tree_flatten(head.model.parameters())]
    assert head.weights_bytes == sum(array.nbytes for array in arrays) > 10_000
    both, alone = (one.room._cost.bytes(2, 100) for one in (scheduler, without))
    heads, width, head_dim, float32 = 2, 32, 8, 4
    per_token = 2 * heads * head_dim * float32
    assert both - alone == 2 * (HELD * width * float32 + per_token * (100 + 255))


def test_all_families_whose_heads_are_known_by_name_are_built() -> None:
    assert KINDS.keys() == FAMILIES.keys()
    assert FAMILIES.keys() == {name.replace("nemotron_h-moe", "nemotron_h") for name in HEADED}


def test_only_the_last_states_are_kept_for_a_head() -> None:
    unread = Unread()
    for start in range(0, 300, 50):
        unread.add(start, mx.arange(start, start + 50)[:, None])
    assert (len(unread), unread.end) == (HELD, 300)
    assert unread.take(3)[:, 0].tolist() == [172, 173, 174]
    assert len(unread) == HELD - 3
    assert unread.take(HELD)[0].tolist() == [175]
    unread.add(0, mx.arange(400)[:, None])
    assert len(unread) == HELD
    assert unread.take(1).tolist() == [[400 - HELD]]
    unread.add(410, mx.zeros((2, 1)))
    assert len(unread) == 2, "what is not next to what is kept takes its place"
