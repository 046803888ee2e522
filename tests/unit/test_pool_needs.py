"""What a model is promised of the budget, and what its engine is told."""

from pathlib import Path

import msgspec
import pytest

from mlx_server.config import Settings
from mlx_server.engine.protocol import LoadOptions, Ready
from mlx_server.errors import InsufficientMemory, ModelLoadFailed
from mlx_server.models.pool.footprint import Footprint, read_footprint
from mlx_server.models.pool.needs import LoadPlan, MemoryPlanner, Need
from mlx_server.models.store.catalog import ModelEntry
from tests.support.bert import build_tiny_bert
from tests.support.tiny import build_quantized, build_tiny_model

OPTIONS = LoadOptions(max_batch=4)
AMPLE = 1 << 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=4096)


def planner(budget: int = AMPLE, kv_cache: str | None = None, on_cpu: bool = True) -> MemoryPlanner:
    return MemoryPlanner(kv_cache, budget, on_cpu)


def entry(path: Path | None, embeds: bool = False) -> ModelEntry:
    return ModelEntry("tiny", path, "folder", embeds=embeds)


def facts(plan: LoadPlan, weights: int, kv: int) -> Ready:
    made = msgspec.convert(
        {
            **dict.fromkeys(("pid", "context_length", "vocab_size", "longest_sequence"), 1),
            "device": "cpu",
            "model_type": "llama",
            "weights_bytes": weights,
            "kv_limit": kv,
            "load_seconds": 0.1,
            "dequantized": True,
            "blas": None,
            "memory": dict.fromkeys(("active", "peak", "cache", "limit"), 1),
            "type": "ready",
        },
        Ready,
    )
    assert isinstance(made, Ready)
    return made


def test_caches_get_a_quarter_of_the_budget_but_no_more_than_a_full_batch_takes(
    path: Path,
) -> None:
    footprint = read_footprint(path, True)
    full = OPTIONS.max_batch * footprint.kv(4096)
    working = footprint.working(OPTIONS.max_batch)
    assert planner().plan(entry(path), OPTIONS).need == Need(footprint.weights, full, working)
    assert planner(2 * full).plan(entry(path), OPTIONS).need.kv == full // 2
    assert planner(kv_cache=str(full // 3)).plan(entry(path), OPTIONS).need.kv == full // 3
    assert planner(4 * full, "50%").plan(entry(path), OPTIONS).need.kv == full


def test_caches_hold_one_sequence_of_2048_tokens_at_least(path: Path) -> None:
    footprint = read_footprint(path, True)
    smallest = footprint.kv(2048)
    assert planner(kv_cache="1").plan(entry(path), OPTIONS).need.kv == smallest
    short = msgspec.structs.replace(OPTIONS, context_length=512)
    assert planner(kv_cache="1").plan(entry(path), short).need.kv == footprint.kv(512)
    least = footprint.weights + footprint.working(OPTIONS.max_batch) + smallest
    assert planner(least).plan(entry(path), OPTIONS).need.total == least
    with pytest.raises(InsufficientMemory, match=f"{least:,}.*{least - 1:,}"):
        planner(least - 1).plan(entry(path), OPTIONS)


def test_a_draft_model_takes_its_weights_and_caches_beside_the_models(
    path: Path, tmp_path: Path
) -> None:
    draft = build_tiny_model(tmp_path / "draft", layers=1)
    both = planner().plan(entry(path), OPTIONS, draft=ModelEntry("draft", draft, "folder"))
    mine, theirs = read_footprint(path, True), read_footprint(draft, True)
    assert both.need.weights == mine.weights + theirs.weights
    assert both.need.kv == OPTIONS.max_batch * (mine.kv(4096) + theirs.kv(4096))
    assert both.options.draft_path == str(draft)
    assert planner().plan(entry(path), OPTIONS).options.draft_path is None


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (ModelEntry("draft", None, "hub"), "`draft` has not been pulled yet"),
        (ModelEntry("draft", Path("x"), "folder", embeds=True), "`draft` makes embeddings"),
        (ModelEntry("draft", Path("x"), "folder", adapter_path=Path("y")), "is an adapter"),
    ],
)
def test_what_cannot_be_a_draft_model_is_refused(
    path: Path, draft: ModelEntry, reason: str
) -> None:
    with pytest.raises(ModelLoadFailed, match=reason):
        planner().plan(entry(path), OPTIONS, draft=draft)


@pytest.mark.parametrize(
    ("mode", "on_cpu", "told"),
    [
        ("auto", True, "always"),
        ("auto", False, "never"),
        ("always", False, "always"),
        ("never", True, "never"),
    ],
)
def test_weights_are_dequantized_on_a_cpu_unless_told_otherwise(
    path: Path, mode: str, on_cpu: bool, told: str
) -> None:
    options = msgspec.structs.replace(OPTIONS, dequantize=mode)
    plan = planner(on_cpu=on_cpu).plan(entry(path), options)
    assert plan.options.dequantize == told
    assert plan.footprint.float32 is (told == "always")


def test_weights_stay_as_they_are_stored_where_float32_does_not_fit(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "half")
    _store_in_half_precision(path)
    whole, stored = read_footprint(path, True), read_footprint(path, False)
    assert stored.weights < whole.weights
    budget = _least(stored)
    assert planner(budget).plan(entry(path), OPTIONS).options.dequantize == "never"
    always = msgspec.structs.replace(OPTIONS, dequantize="always")
    with pytest.raises(InsufficientMemory):
        planner(budget).plan(entry(path), always)


@pytest.mark.parametrize(
    ("less_than", "told"),
    [(None, "both"), ("both", "always"), ("always", "packed"), ("packed", "never")],
)
def test_a_cpu_gets_the_fastest_format_that_fits(
    tmp_path: Path, less_than: str | None, told: str
) -> None:
    plain = build_tiny_model(tmp_path / "plain", hidden=256)
    path = build_quantized(plain, tmp_path / "quantized", bits=4)
    whole = {
        "both": read_footprint(path, True, packed=True),
        "always": read_footprint(path, True),
        "packed": read_footprint(path, False, packed=True),
    }
    able = planner(AMPLE if less_than is None else _least(whole[less_than]) - 1)
    able.packs = True
    plan = able.plan(entry(path), OPTIONS)
    assert plan.options.dequantize == told
    assert plan.footprint == whole.get(told, read_footprint(path, False))
    divided = msgspec.structs.replace(OPTIONS, ranks=2)
    assert able.plan(entry(path), divided).options.dequantize in ("always", "never")


def _least(footprint: Footprint) -> int:
    return footprint.weights + footprint.working(OPTIONS.max_batch) + footprint.kv(2048)


def _store_in_half_precision(path: Path) -> None:
    import mlx.core as mx

    file = str(path / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    half = {name: weight.astype(mx.float16) for name, weight in weights.items()}
    mx.eval(half)
    mx.save_safetensors(file, half, metadata={"format": "mlx"})


def test_measured_weights_replace_the_estimate_for_good(path: Path) -> None:
    one = planner()
    plan = one.plan(entry(path), OPTIONS)
    measured = plan.need.weights - 100
    corrected = one.correct(plan, facts(plan, measured, plan.need.kv))
    assert corrected.need == Need(measured, plan.need.kv, plan.need.working)
    assert one.plan(entry(path), OPTIONS).need.weights == measured


def test_a_corrected_need_is_never_more_than_the_engine_was_allowed(path: Path) -> None:
    one = planner()
    plan = one.plan(entry(path), OPTIONS)
    heavier = plan.need.weights + 100
    corrected = one.correct(plan, facts(plan, heavier, plan.need.kv)).need
    assert corrected.total == plan.need.total
    assert corrected.working == plan.need.working - 100


def test_an_embedding_model_is_told_its_longest_text(tmp_path: Path) -> None:
    path = build_tiny_bert(tmp_path / "bert", context=128)
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    plan = planner().plan(entry(path, embeds=True), OPTIONS)
    assert plan.embedding is not None
    assert plan.need.kv == 0
    assert plan.options.context_length == plan.footprint.context_length == 64


def test_what_an_engine_takes_beside_its_arrays_comes_off_the_budget(path: Path) -> None:
    footprint = read_footprint(path, True)
    overhead = 1000
    least = _least(footprint) + overhead
    one = MemoryPlanner(None, least, on_cpu=True, overhead=overhead)
    plan = one.plan(entry(path), OPTIONS)
    assert (plan.need.total, plan.need.arrays) == (least, least - overhead)
    corrected = one.correct(plan, facts(plan, plan.need.weights - 1, plan.need.kv)).need
    assert (corrected.total, corrected.overhead) == (least - 1, overhead)
    with pytest.raises(InsufficientMemory):
        MemoryPlanner(None, least - 1, on_cpu=True, overhead=overhead).plan(entry(path), OPTIONS)


def test_a_model_that_is_not_there_has_no_plan() -> None:
    with pytest.raises(ModelLoadFailed, match="not been pulled"):
        planner().plan(entry(None), OPTIONS)


def test_ranks_take_a_part_of_the_weights_and_caches_each(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=2)
    whole, part = read_footprint(path, True), planner().plan(entry(path), options).footprint
    assert 0 < whole.undivided < whole.weights
    assert part.weights == whole.undivided + (whole.weights - whole.undivided) / 2
    assert part.kv_per_token == whole.kv_per_token / 2
    both = planner().plan(entry(path), options)
    assert both.processes == 2
    assert both.bytes == 2 * both.need.total


def test_the_rank_with_most_layers_decides_what_each_takes(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "five", "qwen", layers=5, model_type="qwen2")
    options = msgspec.structs.replace(OPTIONS, ranks=3)
    whole, part = read_footprint(path, True), planner().plan(entry(path), options).footprint
    assert len(set(whole.layers)) == 1
    assert part.weights == whole.weights - 3 * whole.layers[0]
    assert part.kv_per_token == whole.kv_per_token * 2 / 5
    one_each = msgspec.structs.replace(OPTIONS, ranks=5)
    assert planner().plan(entry(path), one_each).footprint.weights < part.weights


def test_single_models_may_be_divided_otherwise() -> None:
    settings = Settings(division="pipeline", division_by_model={"b": "tensor"})
    assert [settings.load_options(id_).division for id_ in "ab"] == ["pipeline", "tensor"]


def test_a_division_that_was_asked_for_is_refused_where_it_cannot_be(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=2, division="pipeline")
    with pytest.raises(ModelLoadFailed, match="models of type llama cannot be divided by layers"):
        planner().plan(entry(path), options)


def test_ranks_hold_the_tokens_that_one_process_would(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, max_batch=64, ranks=2)
    one = planner(1 << 28, "32MB").plan(entry(path), msgspec.structs.replace(options, ranks=1))
    two = planner(1 << 28, "32MB").plan(entry(path), options)
    assert two.need.kv == one.need.kv // 2
    assert two.need.kv // two.footprint.kv_per_token == one.need.kv // one.footprint.kv_per_token


def test_a_refusal_counts_the_ranks_of_all_replicas(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=2)
    with pytest.raises(
        InsufficientMemory, match="bytes of memory for 3 engines of 2 ranks and all"
    ):
        planner(1 << 20).plan(entry(path), options, replicas=3)


def test_models_that_embed_are_never_divided(tmp_path: Path) -> None:
    bert = build_tiny_bert(tmp_path / "bert")
    options = msgspec.structs.replace(OPTIONS, ranks=2)
    assert planner().plan(entry(bert, embeds=True), options).options.ranks == 1
    plan = planner().plan(entry(bert, embeds=True), OPTIONS, hosts=("second",))
    assert (plan.hosts, plan.options.ranks) == ((), 1)


def test_this_machine_has_one_rank_of_several_machines(path: Path) -> None:
    plan = planner().plan(entry(path), OPTIONS, hosts=("second",))
    assert (plan.options.ranks, plan.processes, plan.hosts) == (2, 1, ("second",))
    assert plan.bytes == plan.need.total
    here = msgspec.structs.replace(OPTIONS, ranks=2)
    assert plan.footprint == planner().plan(entry(path), here).footprint
    with pytest.raises(ModelLoadFailed, match="ranks"):
        planner().plan(entry(path), OPTIONS, hosts=("second", "third"))


def test_ranks_say_how_many_of_several_machines_have_a_part(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=2)
    plan = planner().plan(entry(path), options, hosts=("second", "third", "fourth"))
    assert (plan.options.ranks, plan.hosts) == (2, ("second", "third", "fourth"))
    options = msgspec.structs.replace(OPTIONS, ranks=4)
    with pytest.raises(ModelLoadFailed, match="4 ranks take a machine each, and 2 are named"):
        planner().plan(entry(path), options, hosts=("second",))


def test_this_machine_has_one_replica_of_several_machines(path: Path) -> None:
    hosts = ("second", "third")
    plan = planner().plan(entry(path), OPTIONS, replicas=2, hosts=hosts)
    assert (plan.options.ranks, plan.replicas, plan.hosts) == (1, 2, hosts)
    assert plan.need == planner().plan(entry(path), OPTIONS).need
    assert plan.bytes == plan.need.total


@pytest.mark.parametrize(
    ("options", "replicas", "why"),
    [
        (OPTIONS, 3, "3 replicas take a machine each, and 2 are named"),
        (msgspec.structs.replace(OPTIONS, ranks=2), 2, "not divided among ranks too"),
    ],
)
def test_what_replicas_on_other_machines_cannot_be(
    path: Path, options: LoadOptions, replicas: int, why: str
) -> None:
    with pytest.raises(ModelLoadFailed, match=why):
        planner().plan(entry(path), options, replicas, hosts=("second",))


def test_ranks_share_what_may_be_wired(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=2)
    one = MemoryPlanner(None, AMPLE, wirable=1 << 20)
    assert one.grant_wired(one.plan(entry(path), options), others=0).wired == 1 << 19


def test_what_cannot_be_divided_is_refused_before_an_engine_starts(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=3)
    with pytest.raises(
        ModelLoadFailed, match="3 ranks cannot share its 4 attention heads and 2 key"
    ):
        planner().plan(entry(path), options)


def test_ranks_with_a_gpu_each_count_as_one_that_has_this_one(path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, ranks=2)
    shared = planner().plan(entry(path), options)
    apart = planner().plan(entry(path), msgspec.structs.replace(options, ranks_over="nccl"))
    assert (shared.processes, apart.processes) == (2, 1)
    assert apart.need.weights == shared.need.weights
