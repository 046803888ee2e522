"""A loaded embedding model: an encoder, or the body of a decoder, and a pooling; or an encoder that
scores pairs of texts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_server.dimensions import context_length
from mlx_server.engine.embedding.encoder import CrossEncoder, Encoder, EncoderArgs
from mlx_server.engine.embedding.pooling import pool
from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import ENCODERS, Embedding, LoadOptions
from mlx_server.engine.run import patches
from mlx_server.engine.run.weights import (
    ModelError,
    as_computed,
    body_classes,
    load_weights,
    read_weights,
)

Floats = NDArray[np.float32]

SMALLEST_NORM = 1e-12
"""A zero vector stays zero."""
BOTH_WAYS = ("use_bidirectional_attention", "is_bidirectional")
"""Decoders made to look ahead, which is not supported."""


class EmbeddingBackend:
    """Raises ModelError when the folder does not hold an embedding model."""

    def __init__(
        self, path: Path, options: LoadOptions, memory: DeviceMemory, embedding: Embedding
    ) -> None:
        self.release = patches.use_device_kernels()
        self._embedding = embedding
        model, config = load_weights(path, options, _scorer if embedding.scores else _classes)
        self.model, self.dequantized = as_computed(model, options, memory)
        self.model.eval()
        self.weights_bytes = read_weights(self.model)
        self.model_type = str(config["model_type"])
        self.vocab_size = int(config["vocab_size"])
        self.context_length = _context_length(self.model, config, options.context_length)
        self.width = self.vectors([[0]]).shape[1]

    def vectors(self, texts: Sequence[Sequence[int]], seconds: Sequence[int] = ()) -> Floats:
        """(texts, width), computed in one pass; `seconds` as in `Embed`. Raises ValueError when
        some are not finite.
        """
        lengths = [len(text) for text in texts]
        padded = np.zeros((len(texts), max(lengths)), np.int32)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        pooled = np.array(self._pooled(mx.array(padded), lengths, seconds))
        if not np.isfinite(pooled).all():
            raise ValueError("the model's output is not finite")
        return pooled

    def _pooled(self, tokens: mx.array, lengths: Sequence[int], seconds: Sequence[int]) -> mx.array:
        if self._embedding.scores:
            scores: mx.array = self.model.scores(tokens, lengths, seconds or lengths)
            return scores
        return pool(self.model(tokens, lengths), lengths, self._embedding.pooling)

    def encode(self, vector: Floats, dimensions: int | None) -> bytes:
        """Little-endian float32 of `vector`, or of its first `dimensions` at length 1."""
        vector = vector[:dimensions]
        if self._embedding.normalize or dimensions is not None:
            vector = vector / max(float(np.linalg.norm(vector)), SMALLEST_NORM)
        return vector.astype("<f4").tobytes()


def _scorer(config: dict[str, Any]) -> tuple[type, type]:
    return CrossEncoder, EncoderArgs


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    if config.get("model_type") in ENCODERS:
        return Encoder, EncoderArgs
    if any(config.get(name) for name in BOTH_WAYS) or config.get("is_causal") is False:
        raise ModelError("its attention looks ahead, which is supported for encoders only")
    return body_classes(config)


def _context_length(model: Any, config: dict[str, Any], cap: int | None) -> int:
    encoder = isinstance(model, Encoder)
    own: int = model.args.context_length if encoder else context_length(config)
    return min(own, cap or own)
