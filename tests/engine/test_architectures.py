"""mlx-lm's architectures with tiny random weights: our text is mlx-lm's, alone and in a batch."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_server.engine.cache.prefix import PrefixCache
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import Generate, LoadOptions, Sampling, Tokens
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.schedule.scheduler import Scheduler
from tests.support.architectures import ARCHITECTURES, VOCAB_SIZE, build_architecture

TOKENS = 12
NEAR = 1e-3
"""Between the two largest logits, up to which either token is right."""
KV_LIMIT = 1 << 30

WRONG_IN_A_BATCH = frozenset(
    {
        *("afm7", "baichuan_m1", "bailing_moe_linear", "gemma2", "gpt_bigcode", "internlm3"),
        *("jamba", "longcat_flash_ngram", "mamba", "nemotron_h", "nemotron_h-moe", "olmo_hybrid"),
        *("recurrent_gemma", "rwkv7"),
    }
)
"""Whose batches of unequal lengths mlx-lm computes wrongly, or not at all."""
NOT_SERVED = frozenset({"deepseek_v41", "llama4"})
"""Whose caches cannot be batched."""
UNSURE = frozenset({"plamo3"})
"""Whose text differs where two tokens are nearly as good."""
CRASHES = frozenset({"gemma4"})
"""With these small windows and layers that share keys, the engine's process ends."""
RIGHT = sorted(ARCHITECTURES.keys() - WRONG_IN_A_BATCH - NOT_SERVED - UNSURE - CRASHES)


@pytest.mark.soak
@pytest.mark.parametrize("name", RIGHT)
def test_text_is_that_of_mlx_lm_alone_together_cached_and_extended(
    tmp_path: Path, name: str
) -> None:
    folder = build_architecture(tmp_path / name, name)
    reference, _ = load_model(folder)
    rng = random.Random(5)
    prompts = [prompt_of(rng, length) for length in (3, 41, 70, 18)]
    extended = prompts[2] + prompt_of(rng, 9)
    scheduler = scheduler_of(folder)
    for prompt in prompts:
        assert_right(reference, prompt, answers(scheduler, [prompt])[0])
    scheduler.runner.prefix.clear()
    for prompt, answer in zip(prompts, answers(scheduler, prompts), strict=True):
        assert_right(reference, prompt, answer)
    for prompt in (prompts[2], extended):
        assert_right(reference, prompt, answers(scheduler, [prompt])[0])


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def scheduler_of(folder: Path) -> Scheduler:
    memory = DeviceMemory("4GB", None)
    backend = Backend(folder, LoadOptions(dequantize="never"), memory)
    prefix = PrefixCache(backend.layout, 0 if backend.layout.obstacle else KV_LIMIT)
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
    return told


def assert_right(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Each token is mlx-lm's for the prompt and the tokens before it, alone in its cache."""
    assert len(answer) == TOKENS
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)  # as mlx-lm's generator does
    inputs = mx.array([prompt[-1:]])
    for token in answer:
        logits = model(inputs, cache=cache)[0, -1].astype(mx.float32)
        assert logits.max().item() - logits[token].item() <= NEAR
        inputs = mx.array([[token]])
