"""mlx-lm's architectures with tiny random weights: our text is mlx-lm's, alone and in a batch."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.loading import load
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import (
    Batching,
    Generate,
    Load,
    LoadOptions,
    Sampling,
    Sharing,
    Tokens,
)
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.weights import ModelError, load_weights
from mlx_server.engine.schedule.scheduler import Scheduler
from mlx_server.models.pool.needs import MemoryPlanner
from mlx_server.models.store.catalog import ModelEntry
from tests.support.architectures import (
    ARCHITECTURES,
    VOCAB_SIZE,
    build_architecture,
    own_config,
)

TOKENS = 12
NEAR = {"plamo3": 0.05}
"""Between the two largest logits, up to which either token is right. Plamo 3 masks one token more
than its cache keeps, so that mlx-lm's own text depends on the chunks of the prompt."""
USUALLY_NEAR = 1e-3
KV_LIMIT = 1 << 30
ROUND = (Sharing.EQUAL, Sharing.EQUAL)
UNPADDED = (Sharing.ANY, Sharing.EQUAL)
LESS: dict[str, tuple[Sharing, Sharing]] = {
    # Their caches hold one sequence, or several of equal length.
    **dict.fromkeys(("llama4", "deepseek_v41"), ROUND),
    # Their positions are numbers: there is no array of them.
    **dict.fromkeys(("afm7", "gpt_bigcode", "internlm3"), ROUND),
    # Padding on the right gets into their states.
    **dict.fromkeys(("baichuan_m1", "bailing_moe_linear", "jamba", "mamba"), UNPADDED),
    **dict.fromkeys(("longcat_flash_ngram", "olmo_hybrid", "recurrent_gemma", "rwkv7"), UNPADDED),
}
"""How decode and prefill may be shared, where that is not by any length."""
SHORT = ("gemma2", "gemma4", "internlm3", "jamba", "llama4", "nemotron_h")
"""One of each way of sharing, and those that are mended."""


def cases() -> list[Any]:
    names = sorted(ARCHITECTURES)
    return [pytest.param(n, marks=() if n in SHORT else pytest.mark.soak) for n in names]


@pytest.mark.parametrize("name", cases())
def test_text_is_that_of_mlx_lm_alone_together_cached_and_extended(
    tmp_path: Path, name: str
) -> None:
    folder = build_architecture(tmp_path / name, name)
    reference, _ = load_model(folder)
    near = NEAR.get(name, USUALLY_NEAR)
    rng = random.Random(5)
    prompts = [prompt_of(rng, length) for length in (3, 41, 70, 18)]
    extended = prompts[2] + prompt_of(rng, 9)
    scheduler = scheduler_of(folder)
    for prompt in prompts:
        assert_right(reference, prompt, answers(scheduler, [prompt])[0], near)
    scheduler.runner.prefix.clear()
    for prompt, answer in zip(prompts, answers(scheduler, prompts), strict=True):
        assert_right(reference, prompt, answer, near)
    for prompt in (prompts[2], extended):
        assert_right(reference, prompt, answers(scheduler, [prompt])[0], near)
    sharing = LESS.get(name, (Sharing.ANY, Sharing.ANY))
    assert said(scheduler.model.batching) == sharing


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_rounding_in_half_precision_is_not_taken_for_a_mistake(
    tmp_path: Path, name: str, kind: str
) -> None:
    model = backend_of(build_architecture(tmp_path / name, name, kind=getattr(mx, kind)))
    try:
        mx.eval(model.forward(mx.array([[1, 2, 3]]), model.new_cache()))
    except RuntimeError as error:
        pytest.skip(str(error))  # a CPU has no experts in half precision
    assert said(model.batching) == LESS.get(name, (Sharing.ANY, Sharing.ANY))


def said(batching: Batching) -> tuple[Sharing, Sharing]:
    whole = batching.decode is batching.prefill is Sharing.ANY
    assert whole == (batching.reason is None)
    return batching.decode, batching.prefill


@pytest.mark.parametrize(
    "name",
    [
        *("afm7", "dbrx", "gpt2", "gpt_bigcode", "gptj", "lille-130m", "openelm", "phi-msft"),
        *("phixtral", "kimi_linear", "mamba"),
    ],
)
def test_a_config_in_its_familys_own_words_gets_memory_for_its_context(
    tmp_path: Path, name: str
) -> None:
    kind = "phixtral" if name == "phi-msft" else name
    folder = build_architecture(tmp_path / name, kind)
    config = own_config(kind) | {"model_type": name}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = MemoryPlanner(None, 1 << 30).plan(ModelEntry(name, folder, "folder"), LoadOptions())
    options = msgspec.structs.replace(
        plan.options, memory_limit=str(plan.need.total), kv_limit=plan.need.kv, openblas="off"
    )
    work, ready = load(Load(str(folder), options))
    work.close()
    assert ready.context_length == plan.footprint.context_length
    assert ready.longest_sequence >= min(2048, ready.context_length)


def test_an_architecture_that_asks_for_a_package_is_a_reason_and_no_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmo"}', encoding="utf-8")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros((1,))})
    with pytest.raises(ModelError, match="package"):
        load_weights(tmp_path, LoadOptions())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_tower.patch.weight": mx.zeros((1,))}, "1 tensors of a picture or sound encoder"),
        ({f"extra.{i}": mx.zeros((1,)) for i in range(9)}, "9 tensors for which.*extra.0, extra.1"),
        ({"lm_head.weight": None}, "lack 1 tensors, such as lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_told_in_short(
    tmp_path: Path, change: dict[str, mx.array | None], says: str
) -> None:
    folder = build_architecture(tmp_path / "model", "llama")
    weights = dict(mx.load(str(folder / "model.safetensors"))) | change
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    with pytest.raises(ModelError, match=says) as failure:
        load_weights(folder, LoadOptions())
    assert "extra.5" not in str(failure.value)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def backend_of(folder: Path, **options: Any) -> Backend:
    given = LoadOptions(dequantize="never", **options)
    return Backend(folder, given, DeviceMemory("4GB", None))


def scheduler_of(folder: Path, **options: Any) -> Scheduler:
    backend = backend_of(folder, **options)
    prefix = PrefixCache(backend.layout, 0 if backend.layout.obstacle else KV_LIMIT)
    memory = DeviceMemory("4GB", None)
    return Scheduler(backend, memory, prefix, max_batch=8, kv_limit=KV_LIMIT, prefill_chunk=None)


def answers(scheduler: Scheduler, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of prompts that come together."""
    told: list[list[int]] = [[] for _ in prompts]
    for id_, prompt in enumerate(prompts):
        assert scheduler.add(Generate(id_, prompt, Sampling(temperature=0), TOKENS)) is None
    while scheduler.busy:
        for message in scheduler.turn():
            for row in message.rows if isinstance(message, Tokens) else ():
                told[row.id] += row.tokens
    assert {len(one) for one in told} == {TOKENS}
    return told


def assert_right(model: Any, prompt: list[int], answer: list[int], near: float) -> None:
    """Each token is mlx-lm's for the prompt and the tokens before it, alone in its cache."""
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)  # as mlx-lm's generator does
    inputs = mx.array([prompt[-1:]])
    for token in answer:
        logits = model(inputs, cache=cache)[0, -1].astype(mx.float32)
        assert logits.max().item() - logits[token].item() <= near
        inputs = mx.array([[token]])
