"""Which requests may share a pass is found as a model is loaded, and what they get is right."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base, llama

from mlx_server.engine.loading import load
from mlx_server.engine.protocol import Batching, Load, LoadOptions, Sharing
from mlx_server.engine.run.even_prefill import EvenPrefill
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.patches import ATTENTION
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.engine.test_architectures import answers, backend_of, prompt_of, scheduler_of
from tests.support.architectures import build_architecture
from tests.support.tiny import build_tiny_model

ONE_ROW_MODEL = '''
"""A model whose cache keeps what it has seen of one sequence in a way of its own."""
import mlx.core as mx
import mlx.nn as nn
from dataclasses import dataclass
from mlx_lm.models.base import BaseModelArgs

@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "one_row"
    vocab_size: int = 128

class Memory:
    def __init__(self):
        self.seen = {"sum": None}
    @property
    def state(self):
        return list(self.seen.values())
    @property
    def nbytes(self):
        return 0 if self.seen["sum"] is None else self.seen["sum"].nbytes
    def make_mask(self, *_, **__):
        return None

class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, 32)
        self.layers = [nn.Linear(32, 32)]
        self.head = nn.Linear(32, args.vocab_size)
    def __call__(self, tokens, cache=None):
        sums = mx.cumsum(mx.sin(20 * self.layers[0](self.embed(tokens))), axis=1)
        if cache[0].seen["sum"] is not None:
            sums = cache[0].seen["sum"][: tokens.shape[0]] + sums
        cache[0].seen["sum"] = sums[:, -1:]
        return self.head(mx.sin(sums))
    def make_cache(self):
        return [Memory()]
'''


def groups_of(scheduler: Scheduler, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Their text together, and the rows of each pass of the first step in which all decode."""
    seen: list[list[int]] = []
    step = scheduler.model.step

    def spying(parts: list[Part], answers: int) -> mx.array:
        seen.append([part.tokens.shape[0] for part in parts])
        return step(parts, answers)

    scheduler.model.step = spying  # type: ignore[method-assign,assignment]
    texts = answers(scheduler, prompts)
    return texts, max(seen, key=sum)


def alone(scheduler: Scheduler, prompts: list[list[int]]) -> list[list[int]]:
    return [answers(scheduler, [prompt])[0] for prompt in prompts]


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [prompt_of(rng, length) for length in (20, 27, 20, 6)]


def test_rows_of_equal_length_share_a_pass_where_caches_know_no_padding(
    tmp_path: Path, prompts: list[list[int]]
) -> None:
    scheduler = scheduler_of(build_architecture(tmp_path / "llama4", "llama4"))
    expected = alone(scheduler, prompts)
    texts, rows = groups_of(scheduler, prompts)
    assert texts == expected
    assert sorted(rows) == [1, 1, 2]


def test_rows_of_a_cache_that_holds_one_sequence_are_computed_one_at_a_time(
    tmp_path: Path, prompts: list[list[int]]
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "model.py").write_text(ONE_ROW_MODEL)
    (folder / "config.json").write_text('{"model_type": "one_row", "model_file": "model.py"}')
    namespace: dict[str, Any] = {"__name__": "one_row"}
    exec(ONE_ROW_MODEL.replace("@dataclass\n", ""), namespace)
    mx.random.seed(1)
    arguments = type("Arguments", (), {"vocab_size": 128})
    namespace["Model"](arguments).save_weights(str(folder / "model.safetensors"))
    scheduler = scheduler_of(folder, trust_remote_code=True)
    found = scheduler.model.batching
    assert (found.decode, found.prefill) == (Sharing.NONE, Sharing.NONE)
    expected = alone(scheduler, prompts)
    texts, rows = groups_of(scheduler, prompts)
    assert texts == expected
    assert rows == [1, 1, 1, 1]


def test_prompts_are_computed_together_unpadded_where_padding_would_get_into_states(
    tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(build_architecture(tmp_path / "jamba", "jamba"))
    expected = alone(scheduler, prompts)
    scheduler.runner.prefix.clear()
    together: list[int] = []
    advance = EvenPrefill.advance

    def spying(self: EvenPrefill, budget: int) -> None:
        together.append(len(self.sequences))
        advance(self, budget)

    monkeypatch.setattr(EvenPrefill, "advance", spying)
    texts, rows = groups_of(scheduler, prompts)
    assert texts == expected
    assert rows == [4]
    assert max(together) > 1


def test_a_mistake_in_padded_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama.create_attention_mask

    def forgetful(h: mx.array, *args: Any, **options: Any) -> Any:
        return original(h, *args, **options) if h.shape[1] > 1 else None

    monkeypatch.setattr(llama, "create_attention_mask", forgetful)
    # In place of one that goes by the caches, if an earlier test had mixed steps.
    monkeypatch.setattr(llama, ATTENTION, getattr(base, ATTENTION))
    found = backend_of(build_tiny_model(tmp_path / "tiny", "llama")).batching
    assert (found.decode, found.prefill) == (Sharing.EQUAL, Sharing.EQUAL)
    assert "decode padded" in str(found.reason)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_rounding_is_not_taken_for_a_mistake(tmp_path: Path, kind: mx.Dtype) -> None:
    """Noise of half precision; and a mistake does show in it."""
    model = backend_of(build_architecture(tmp_path / "qwen3", "qwen3", kind=kind))
    assert model.batching == Batching(Sharing.ANY, Sharing.ANY)
    wrong = build_architecture(tmp_path / "mamba", "mamba", kind=kind)
    assert backend_of(wrong).batching.prefill is Sharing.EQUAL


def test_the_engine_says_how_requests_share_passes_and_why(tmp_path: Path) -> None:
    folder = build_architecture(tmp_path / "jamba", "jamba")
    work, ready = load(Load(str(folder), LoadOptions(openblas="off")))
    try:
        assert ready.batching is not None
        assert (ready.batching.decode, ready.batching.prefill) == (Sharing.ANY, Sharing.EQUAL)
        assert "prefill padded" in str(ready.batching.reason)
    finally:
        work.close()
