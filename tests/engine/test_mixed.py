"""Chunks of prompts computed in one pass with decode steps, and sequences with caches apart."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx.nn.layers.linear import Linear
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling, Tokens
from mlx_server.engine.run import mixed, patches
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.kv import merge
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.engine.conftest import request
from tests.support.tiny import build_recurrent_model, build_tiny_model

GREEDY = Sampling(temperature=0)
STREAMS = [
    request(range(3, 23), 70),
    request(range(7, 90), 60, Sampling(seed=1, temperature=0.9, presence_penalty=0.7)),
    request(range(30, 41), 80, Sampling(seed=2, top_p=0.9, repetition_penalty=1.2), logprobs=2),
]
LATE = [
    request([(7 * i) % 400 for i in range(500)], 20),
    request([(11 * i) % 400 for i in range(400)], 20, Sampling(seed=3, frequency_penalty=0.4)),
    request([(5 * i) % 400 for i in range(40)], 20),
]


def scheduler_of(path: Path, *, prefixes: int = 0, **options: Any) -> Scheduler:
    """`prefixes`: bytes of the prefix cache."""
    memory = DeviceMemory("50%", None)
    backend = Backend(path, LoadOptions(**options), memory)
    cache = PrefixCache(backend.layout, prefixes)
    return Scheduler(backend, memory, cache, max_batch=16, kv_limit=1 << 28, prefill_chunk=64)


def tokens_of(scheduler: Scheduler, first: list[Generate], late: list[Generate]) -> dict[int, Any]:
    """The tokens of all requests by place; `late` ones come when the first have begun."""
    requests = {i: _numbered(one, i) for i, one in enumerate([*first, *late])}
    told: dict[int, list[int]] = {i: [] for i in requests}
    for i in range(len(first)):
        assert scheduler.add(requests[i]) is None
    while scheduler.busy or late:
        for message in scheduler.turn():
            for row in message.rows if isinstance(message, Tokens) else ():
                told[row.id] += row.tokens
        if late and all(told[i] for i in range(len(first))):
            for i in range(len(first), len(requests)):
                assert scheduler.add(requests[i]) is None
            late = []
    return told


def _numbered(one: Generate, number: int) -> Generate:
    return msgspec.structs.replace(one, id=number, caller=str(number))


@pytest.mark.parametrize(
    ("family", "kv_bits"),
    [("llama", None), ("llama", 8), ("qwen", None), ("mistral", None), ("gemma", None)],
)
def test_long_prompts_that_arrive_beside_streams_change_no_text(
    tmp_path: Path, family: str, kv_bits: int | None
) -> None:
    path = build_tiny_model(tmp_path / family, family, hidden=128)
    scheduler = scheduler_of(path, kv_bits=kv_bits)
    assert scheduler.model.mixes
    together = tokens_of(scheduler, STREAMS, LATE)
    assert scheduler.pace.mixed.tokens_within(1.0, 0) > 0, "no chunk was computed beside a step"
    alone = [tokens_of(scheduler, [one], [])[0] for one in [*STREAMS, *LATE]]
    assert list(together.values()) == alone


def test_a_model_whose_layers_ask_more_of_a_cache_is_left_as_it_was(tmp_path: Path) -> None:
    scheduler = scheduler_of(build_recurrent_model(tmp_path / "recurrent"))
    assert not scheduler.model.mixes
    together = tokens_of(scheduler, STREAMS, LATE)
    alone = [tokens_of(scheduler, [one], [])[0] for one in [*STREAMS, *LATE]]
    assert list(together.values()) == alone


def test_a_model_that_gives_other_logits_in_one_pass_is_not_used_so(tmp_path: Path) -> None:
    model, _ = load_model(build_tiny_model(tmp_path / "tiny"))
    attention = type(model.layers[0].self_attn)
    original = attention.__call__

    def mistaken(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        out: mx.array = original(self, x, mask, cache)
        return out * 1.5 if isinstance(cache, mixed.MixedLayer) else out

    attention.__call__ = mistaken
    try:
        obstacle = patches.enable_mixed_passes(model, lambda: make_prompt_cache(model))
    finally:
        attention.__call__ = original
    assert obstacle is not None
    assert "logits differ" in obstacle


def test_why_a_model_takes_no_mixed_steps_is_said(tmp_path: Path) -> None:
    assert scheduler_of(build_tiny_model(tmp_path / "tiny")).model.mixed_steps == "on"
    recurrent = scheduler_of(build_recurrent_model(tmp_path / "recurrent")).model
    assert recurrent.mixed_steps.startswith("off: ")


def rounding_by_shape(self: Linear, x: mx.array) -> mx.array:
    """A product whose sums are rounded in other places for another number of rows, as on a GPU."""
    rows = x.size // x.shape[-1]
    step = 8 if rows == 1 else 16 if rows < 5 else 32
    starts = range(0, x.shape[-1], step)
    parts = [x[..., i : i + step] @ self.weight[:, i : i + step].T for i in starts]
    out = sum(parts[1:], parts[0])
    return out + self.bias if "bias" in self else out


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_noise_of_half_precision_is_told_from_a_mistake(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(build_tiny_model(tmp_path / family, family, layers=6, hidden=64))
    model.set_dtype(mx.bfloat16)
    monkeypatch.setattr(Linear, "__call__", rounding_by_shape)

    def obstacle() -> str | None:
        return patches.enable_mixed_passes(model, lambda: make_prompt_cache(model))

    with monkeypatch.context() as strict:
        strict.setattr(mixed, "MOST", 0.0)
        assert "logits differ" in (obstacle() or ""), "there is no noise"
    with monkeypatch.context() as mistaken:
        positions = Part.positions
        mistaken.setattr(
            Part, "positions", lambda part: positions(part) + part.tokens.shape[1] // 2
        )
        assert "logits differ" in (obstacle() or "")
    assert obstacle() is None


def test_a_pass_over_several_caches_gives_the_logits_of_separate_ones(tmp_path: Path) -> None:
    backend = Backend(build_tiny_model(tmp_path / "tiny"), LoadOptions(), DeviceMemory("50%", None))

    def caches() -> list[Any]:
        lengths = (5, 40, 300)
        begun = [backend.new_cache() for _ in lengths]
        for length, cache in zip(lengths, begun, strict=True):
            backend.prefill(mx.arange(length)[None], cache)
        return [merge(begun[:2]), merge(begun[2:])]

    inputs = [mx.array([[3], [4]]), mx.array([[5]])]
    separate = [backend.forward(t, c) for t, c in zip(inputs, caches(), strict=True)]
    parts = [Part(t, c) for t, c in zip(inputs, caches(), strict=True)]
    together = backend.step(parts, 3).logits
    assert mx.allclose(together, mx.concatenate(separate), rtol=1e-5, atol=1e-5)


def test_a_short_answer_is_not_padded_to_a_long_one_beside_it(tmp_path: Path) -> None:
    scheduler = scheduler_of(build_tiny_model(tmp_path / "tiny"))
    short = [request(range(3, 23), 40) for _ in range(8)]
    most = 0
    for i, one in enumerate([*short, request([5] * 1500, 40)]):
        assert scheduler.add(_numbered(one, i)) is None
    while scheduler.busy:
        for _ in scheduler.turn():
            most = max(most, scheduler.stats().kv_bytes)
    cost = scheduler.model.kv_cost
    assert most <= cost.bytes(8, 300) + cost.bytes(1, 1540)
    assert most < cost.bytes(9, 1500) / 3
