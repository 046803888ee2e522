"""What follows mlx-lm's changing internals: loading, forward pass, KV caches.

mlx-lm keeps the architectures and the cache classes; what depends on their names is here and in
`engine/cache` and `engine/cpu`, and is pinned to the range in pyproject.toml.
"""

import bisect
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import (
    _get_classes,
    dequantize_model,
    get_total_parameters,
    load_adapters,
    load_model,
)

from mlx_server.engine.cache.layout import Cache, KvLayout, leaves
from mlx_server.engine.cache.quant import CannotQuantize, check_support, quantize_cache
from mlx_server.engine.memory import DeviceMemory, device_name
from mlx_server.engine.protocol import LoadOptions
from mlx_server.engine.run import mixed
from mlx_server.engine.run.mixed import Part

DEFAULT_CONTEXT = 4096
FLOAT32_BYTES = 4
SPREAD = 32
"""Tokens by which the caches of a prompt's layers differ in size at first."""
SLACK = 8
"""The same once they hold all of it."""
STAGGERED = 32
"""After how many layers sizes repeat."""

log = logging.getLogger("mlx_server.engine")


class ModelError(Exception):
    """The model folder cannot be loaded; the message says why."""


class Backend:
    """A loaded model: its forward pass and its caches.

    `context_length` is in tokens, `weights_bytes` what the parameters take in memory.
    """

    def __init__(
        self,
        path: Path,
        options: LoadOptions,
        memory: DeviceMemory,
        adapter_path: Path | None = None,
    ) -> None:
        self.path = path
        self.release = speed_up()
        """Lets go of what outlives a step; for when nothing runs."""
        self.model, config = load_weights(path, options)
        if adapter_path is not None:
            self.model = _with_adapter(self.model, adapter_path)
        self.model_type = str(config.get("model_type", "unknown"))
        self.context_length = context_length(config, options.context_length)
        self.model, self.dequantized = as_computed(self.model, options, memory)
        self.kv_bits = _usable_kv_bits(self.model, options)
        mx.eval(self.model.parameters())
        arrays: dict[str, mx.array] = dict(tree_flatten(self.model.parameters()))
        self.weights_bytes = sum(array.nbytes for array in arrays.values())
        # One token, never computed: only shapes are asked for. The output's width may differ from
        # the tokenizer's vocabulary.
        cache = self.new_cache()
        self.vocab_size = int(self.forward(mx.array([[0]]), cache).shape[-1])
        self.kv_cost = KvCost(cache)
        self.layout = KvLayout(cache)
        obstacle = mixed.enable(self.model, self.new_cache, merge)
        self.mixes = obstacle is None
        """Whether tokens for several caches can be computed in one pass."""
        if obstacle is not None:
            log.info("event=mixed_steps_off reason=%r", obstacle)

    def new_cache(self) -> Cache:
        cache = list(make_prompt_cache(self.model))
        return quantize_cache(cache, self.kv_bits) if self.kv_bits else cache

    def forward(self, tokens: mx.array, cache: Cache) -> mx.array:
        """Logits (batch, tokens, vocab) after `tokens` (batch, tokens); grows `cache`."""
        logits: mx.array = self.model(tokens, cache=cache)
        return logits

    def step(self, parts: Sequence[Part], answers: int) -> mx.array:
        """Logits (answers, 1, vocab) of the first `answers` rows of `parts`; grows their caches.

        More than one part needs a model that `mixes`.
        """
        if len(parts) == 1:
            return self.forward(parts[0].tokens, parts[0].cache)
        return mixed.forward(self.model, parts, answers)

    def prefill(self, tokens: mx.array, cache: Cache) -> None:
        """Compute `tokens` (batch, tokens) into `cache`; the output projection is never run."""
        self.forward(tokens, cache)
        mx.eval([layer.state for layer in cache])


class KvCost:
    """What KV caches take in memory, derived from a cache that holds one token."""

    STEP = 256
    """Tokens by which mlx-lm's caches grow."""

    def __init__(self, cache: Cache) -> None:
        parts = [_part(leaf) for leaf in leaves(cache)]
        self.fixed = sum(fixed for fixed, _, _ in parts)
        self._growing = [(size, window) for _, size, window in parts if size]

    def bytes(self, rows: int, tokens: int) -> int:
        """Bytes of a batch cache of `rows`, the longest of which holds `tokens`."""
        # A cache grows from where it is, which after a merge is at any length.
        room = tokens + self.STEP - 1
        growing = sum(size * min(room, window or room) for size, window in self._growing)
        return rows * (self.fixed + growing)

    def longest(self, limit: int, context_length: int) -> int:
        """The most tokens, up to `context_length`, that one sequence can hold in `limit` bytes."""
        if self.bytes(1, context_length) <= limit:
            return context_length
        lengths = range(context_length)
        fitting = bisect.bisect_right(lengths, limit, key=lambda tokens: self.bytes(1, tokens))
        return max(0, fitting - 1)


def _part(leaf: Any) -> tuple[int, int, int | None]:
    """Fixed bytes, bytes a token, and window in tokens, of a layer's cache."""
    if isinstance(leaf, KVCache | RotatingKVCache) and leaf.keys is not None:
        array = leaf.keys if isinstance(leaf.keys, mx.array) else leaf.keys[0]
        return (0, leaf.nbytes // array.shape[2], getattr(leaf, "max_size", None))
    return (int(leaf.nbytes), 0, None)


def merge(caches: list[Cache]) -> Cache:
    """One batch cache with a row for each of `caches`.

    Raises ModelError when the model's kind of cache cannot be batched.
    """
    first = caches[0]
    for layer in first:
        if not hasattr(layer, "merge"):
            raise ModelError(f"{type(layer).__name__} does not support batching")
    if len(caches) == 1:
        return [_batch_of_one(layer) for layer in first]
    return [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(first)]


def _batch_of_one(layer: Any) -> Any:
    """A batch cache of one row, without a copy where that can be had."""
    if type(layer) is not KVCache:
        return layer.merge([layer])
    batch = BatchKVCache([0])
    batch.keys, batch.values, batch._idx = layer.keys, layer.values, layer.offset
    batch.offset = mx.array([layer.offset])
    return batch


def reserve(cache: Cache, tokens: int, chunk: int) -> None:
    """Prepare a cache of one sequence for `chunk` of the `tokens` of its prompt still to come.

    A full cache is copied to a larger one. Sizes are staggered, so that layers do this in turn.
    """
    for index, leaf in enumerate(leaves(cache)):
        if isinstance(leaf, KVCache):
            whole = tokens + SLACK * (index % STAGGERED)
            first = SPREAD * (index % STAGGERED + 1)
            leaf.step = first if leaf.keys is None and chunk < first < whole else whole


def extend(cache: Cache, other: Cache) -> Cache:
    """`cache` with the rows of `other` after its own; both are batch caches."""
    if not cache:
        return other
    for layer, more in zip(cache, other, strict=True):
        layer.extend(more)
    return cache


def keep_rows(cache: Cache, rows: list[int]) -> Cache:
    if not rows:
        return []
    for layer in cache:
        layer.filter(rows)
    return cache


def pad_right(cache: Cache, lengths: list[int]) -> None:
    """Announce that the next tokens are padded on the right to the longest of `lengths`."""
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=padding)


def unpad(cache: Cache) -> None:
    """Move the padding announced by `pad_right` to the left, where decoding ignores it."""
    for layer in cache:
        layer.finalize()
    mx.eval([layer.state for layer in cache])


def cache_bytes(cache: Cache) -> int:
    return sum(int(layer.nbytes) for layer in cache)


def speed_up() -> Callable[[], None]:
    """Prepare this process for the device; returns what lets go of what outlives a step.

    Call it before a model's own module is imported.
    """
    if device_name() != "cpu":
        return _nothing
    from mlx_server.engine.cpu import attention as cpu

    cpu.speed_up()
    return cpu.forget


def _nothing() -> None:
    return None


Classes = Callable[[dict[str, Any]], tuple[type, type]]
"""The classes of a model and of its arguments, for its configuration."""


def load_weights(
    path: Path, options: LoadOptions, classes: Classes = _get_classes
) -> tuple[Any, dict[str, Any]]:
    """The model in `path`, its weights not read yet, and its config. Raises ModelError."""
    try:
        model, config = load_model(
            path,
            lazy=True,
            get_model_classes=classes,
            trust_remote_code=options.trust_remote_code,
        )
    except json.JSONDecodeError as error:
        raise ModelError(f"config.json is not valid JSON: {error}") from error
    except FileNotFoundError as error:
        raise ModelError(f"a file is missing: {error}") from error
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(f"{type(error).__name__}: {error}") from error
    return model, config


def body_classes(config: dict[str, Any]) -> tuple[type, type]:
    """The classes for a decoder without its output projection.

    Called with tokens (rows, tokens) and the rows' lengths, it gives (rows, tokens, width).
    """
    whole, arguments = _get_classes(config)

    class Body(whole):  # type: ignore[misc, valid-type]
        def __call__(self, tokens: mx.array, lengths: Sequence[int]) -> mx.array:
            # No token sees those after it, so padding on the right changes nothing.
            states: mx.array = self.model(tokens)
            return states

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if not any(name.startswith("model.") for name in weights):
                weights = {f"model.{name}": weight for name, weight in weights.items()}
            if hasattr(whole, "sanitize"):
                weights = super().sanitize(weights)
            self.pop("lm_head", None)
            return {name: w for name, w in weights.items() if not name.startswith("lm_head.")}

    return Body, arguments


def as_computed(model: Any, options: LoadOptions, memory: DeviceMemory) -> tuple[Any, bool]:
    """`model` in the format that it is to be computed in; whether that is float32 for its sake."""
    if not _wants_float32(options, model, memory):
        return model, False
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model, True


def _with_adapter(model: Any, path: Path) -> Any:
    try:
        adapted = load_adapters(model, str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ModelError(
            f"the adapter in {path.name} cannot be applied: {type(error).__name__}: {error}"
        ) from error
    adapted.eval()
    return adapted


def _wants_float32(options: LoadOptions, model: Any, memory: DeviceMemory) -> bool:
    """On a CPU device float32 runs several times faster than any narrower format."""
    if options.dequantize != "auto":
        return options.dequantize == "always"
    needed = int(get_total_parameters(model)) * FLOAT32_BYTES
    return device_name() == "cpu" and needed < memory.limit


def _usable_kv_bits(model: Any, options: LoadOptions) -> int | None:
    """The bits of quantized KV caches, None where all caches stay as they are.

    Raises ModelError when the model's attention cannot use them.
    """
    if options.kv_bits is None:
        return None
    try:
        return options.kv_bits if check_support(model, options.kv_bits) else None
    except CannotQuantize as error:
        raise ModelError(str(error)) from error


def _from_config(config: dict[str, Any], name: str) -> Any:
    """A value of the configuration, or of its text part in a multimodal model."""
    return config.get(name) or (config.get("text_config") or {}).get(name)


def context_length(config: dict[str, Any], cap: int | None) -> int:
    """Tokens that the model was made for, up to `cap`."""
    own = int(_from_config(config, "max_position_embeddings") or DEFAULT_CONTEXT)
    return min(own, cap) if cap else own
