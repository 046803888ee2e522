"""A loaded model that generates."""

import itertools
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_server.dimensions import context_length
from mlx_server.engine.cache.layout import Cache, KvLayout
from mlx_server.engine.cache.quant import CannotQuantize, check_support, quantize_cache
from mlx_server.engine.cpu import packed
from mlx_server.engine.memory import DeviceMemory, device_name
from mlx_server.engine.protocol import LoadOptions, Sharing
from mlx_server.engine.ranks.sharing import ALONE, Ranks
from mlx_server.engine.run import batching, kv, mixed, patches, scores
from mlx_server.engine.run.adapters import apply_adapter
from mlx_server.engine.run.heads.head import Head, load_head
from mlx_server.engine.run.kv import KvCost
from mlx_server.engine.run.mixed import Part
from mlx_server.engine.run.sharding import divide
from mlx_server.engine.run.weights import (
    ModelError,
    as_computed,
    load_weights,
    read_weights,
)

PACKS = ("both", "packed")
"""`LoadOptions.dequantize` by which packed weights are used."""

log = logging.getLogger("mlx_server.engine")


class Passed(NamedTuple):
    """Logits (tokens, 1, vocab), and where a head reads them the last hidden states (tokens, 1,
    width); `beside` are those (tokens, width) of tokens in the pass that get no logits.
    """

    logits: mx.array
    states: mx.array | None
    beside: mx.array | None = None


class Backend:
    """`release` frees what outlives a step, when nothing runs.

    `tokens_within_scores`: from how many tokens are computed to how many a chunk may have.
    `eager`: passes over several tokens a row compute while they are built, and so do those over
    one of no more than `eager_rows`. `mixes`: several caches can share a pass; `mixed_steps` says
    so for people, or why not. `guesses`: rows can draw several tokens in one; where one is wrong,
    `goes_back` says that all tokens of the pass are undone for the row, and those that were right
    are computed again. `ranks`: the processes that compute it together; `layered`: each of them has
    layers of its own, and so other weights and caches than the rest. `largest_part`: bytes of the
    weights of the rank with most. `head`: a layer of its own that guesses further tokens, where it
    is there and wanted.
    """

    def __init__(
        self,
        path: Path,
        options: LoadOptions,
        memory: DeviceMemory,
        adapter_path: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.path = path
        self.ranks = ranks
        self.eager = device_name() == "cpu"
        self.release = patches.use_device_kernels()
        self.model, config = load_weights(path, options)
        if adapter_path is not None:
            self.model = apply_adapter(self.model, adapter_path)
        self.model_type = str(config.get("model_type", "unknown"))
        self.head: Head | None = None
        own = context_length(config)
        self.context_length = min(own, options.context_length or own)
        products = packed.products(self.model) if options.dequantize in PACKS else {}
        self.model, self.dequantized = as_computed(self.model, options, memory, ranks)
        layers = None
        if ranks.group is not None:
            adapted = adapter_path is not None
            layers = divide(self.model, config, ranks.group, options.division, adapted=adapted)
        self.layered = layers is not None
        self.kv_bits = _usable_kv_bits(self.model, options)
        packed.use(self.model, products)
        taken = sum(product.bytes for product in products.values())
        self.eager_rows = packed.most_rows(products, narrow=not self.dequantized)
        self.weights_bytes = taken + read_weights(self.model)
        self.largest_part = ranks.most(self.weights_bytes)
        # One token, never computed: only shapes are asked for. The output's width may differ from
        # the tokenizer's vocabulary.
        cache = self.new_cache()
        self.vocab_size = int(self.forward(mx.array([[0]]), cache).shape[-1])
        self.kv_cost = KvCost(cache)
        self.layout = KvLayout(cache, ranks.everywhere)
        pair_bytes = 0 if self.eager else scores.bytes_per_pair(self.model, self.new_cache)
        self.tokens_within_scores = partial(scores.tokens_within, ranks.most(pair_bytes))
        patches.mend_padding(self.model)
        self.batching = batching.find(self)
        self.caches = batching.row_caches(self.batching)
        self._log_batching()
        sample = self.caches.merge([self.new_cache()])
        shortens = ranks.everywhere(kv.can_roll_back(sample))
        self.goes_back = ranks.everywhere(kv.can_go_back(sample)) and not shortens
        # Rows of several lengths must not get into each other's states.
        padded = self.batching.prefill if self.goes_back else self.batching.decode
        able = (shortens or self.goes_back) and padded is Sharing.ANY
        self.guesses = able and options.speculation == "auto"
        obstacle = self._obstacle_to_mixed_passes()
        self.mixes = obstacle is None
        self.mixed_steps = "on" if obstacle is None else f"off: {obstacle}"
        if obstacle is not None:
            log.info("event=mixed_steps_off reason=%r", obstacle)
        if self.guesses and options.draft_path is None and ranks.size == 1:
            wide = self.dequantized or self.eager_rows > 0
            self.head = load_head(path, config, self.model, float32=wide)
        if layers is not None:
            layers.join()

    def agreed(self, value: float) -> float:
        """What was measured, the same for all ranks that compute the same."""
        return value if self.layered else self.ranks.agreed(value)

    def common(self, obstacle: str | None) -> str | None:
        """What is in the way, here or in another rank. All must ask."""
        if self.ranks.everywhere(obstacle is None):
            return None
        return obstacle or "another rank cannot"

    def new_cache(self) -> Cache:
        cache = list(make_prompt_cache(self.model))
        return quantize_cache(cache, self.kv_bits) if self.kv_bits else cache

    def forward(self, tokens: mx.array, cache: Cache) -> mx.array:
        """(batch, tokens, vocab) from `tokens` (batch, tokens); grows `cache`."""
        return self._passed(self._whole(tokens, cache=cache)).logits

    def step(self, parts: Sequence[Part], answers: int) -> Passed:
        """Of the first `answers` tokens of `parts`; grows their caches.

        A part with a chunk of a prompt needs `mixes`.
        """
        if self.mixes and (len(parts) > 1 or any(part.counts for part in parts)):
            return self._mixed(parts, answers)
        passed = [self._pass(part) for part in parts]
        return self._passed(passed[0] if len(passed) == 1 else mx.concatenate(passed))

    def last_logits(self, parts: Sequence[Part]) -> mx.array:
        """Logits (rows, vocab) after the last token of each row that has one; grows caches."""
        counts = [count for part in parts for count in part.row_counts]
        ends = zip(itertools.accumulate(counts), counts, strict=True)
        lasts = [end - 1 for end, count in ends if count]
        if self.mixes and max(counts) > 1:
            return mixed.forward(self.model, parts, mx.array(lasts))[:, -1]
        logits = self.step(parts, lasts[-1] + 1).logits
        return logits[:, -1] if len(lasts) == logits.shape[0] else logits[mx.array(lasts), -1]

    @property
    def _whole(self) -> Any:
        """Called with tokens and a cache, it gives what `_passed` takes."""
        return self.model if self.head is None else self.head.trunk

    def _mixed(self, parts: Sequence[Part], answers: int) -> Passed:
        if self.head is None:
            return Passed(mixed.forward(self.model, parts, answers), None)
        count = sum(sum(part.row_counts) for part in parts)
        states = mixed.forward(self.head.trunk, parts, count)
        answering = mx.contiguous(states[:answers])  # rows keep it, and shall keep no more
        return Passed(self.head.trunk.project(answering), answering, states[answers:, 0])

    def _passed(self, out: mx.array) -> Passed:
        if self.head is None:
            return Passed(out, None)
        return Passed(self.head.trunk.project(out), out)

    def _pass(self, part: Part) -> mx.array:
        padded = self.goes_back and part.counts is not None
        if padded:
            kv.pad_right(part.cache, list(part.row_counts))
        out, layout = self._whole(part.tokens, cache=part.cache), part.layout
        if padded:
            kv.unpad(part.cache)
        whole: mx.array = out if layout.single else layout.flat(out)[:, None]
        return whole

    def prefill(self, tokens: mx.array, cache: Cache) -> mx.array | None:
        """`tokens` are (batch, tokens); the output projection is never run.

        Returns the last hidden states (batch, tokens, width) if there is a head, not yet computed.
        """
        out: mx.array = self._whole(tokens, cache=cache)
        mx.eval([layer.state for layer in cache])
        return None if self.head is None else out

    def _log_batching(self) -> None:
        found = self.batching
        log.info(
            "event=batching decode=%r prefill=%r reason=%r",
            str(found.decode),
            str(found.prefill),
            found.reason,
        )

    def _obstacle_to_mixed_passes(self) -> str | None:
        if self.batching.decode is not Sharing.ANY:
            return "its rows cannot share every pass"
        return self.common(patches.enable_mixed_passes(self.model, self.new_cache, self.agreed))


def _usable_kv_bits(model: Any, options: LoadOptions) -> int | None:
    """None where nothing can be quantized. Raises ModelError."""
    if options.kv_bits is None:
        return None
    try:
        return options.kv_bits if check_support(model, options.kv_bits) else None
    except CannotQuantize as error:
        raise ModelError(str(error)) from error
