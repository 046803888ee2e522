"""A model in two steps: to the states that its head reads, and to logits."""

import copy
from typing import Any

import mlx.core as mx
from mlx.nn.layers.linear import Identity

from mlx_server.engine.cache.layout import Cache


class Trunk:
    """To its last hidden states (rows, tokens, width), after its last norm."""

    def __init__(self, model: Any) -> None:
        self.text = getattr(model, "language_model", model)

    @property
    def body(self) -> Any:
        return self.text.model

    @property
    def embeddings(self) -> Any:
        return self.body.embed_tokens

    @property
    def arguments(self) -> Any:
        return self.text.args

    @property
    def layer_class(self) -> type[Any]:
        """Of its layers. mlx-lm's modules are not imported here, since what they find then of
        `patches.use_device_kernels` they keep.
        """
        return type(self.body.layers[-1])

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        states: mx.array = self.body(tokens, cache=cache)
        return states

    def project(self, states: mx.array) -> mx.array:
        """Logits (…, vocab) from what it has been called for."""
        return self.output(states)

    def output(self, normed: mx.array) -> mx.array:
        """The output projection alone."""
        tied = "lm_head" not in self.text
        project = self.embeddings.as_linear if tied else self.text.lm_head
        logits: mx.array = project(normed)
        return logits

    def converted(
        self, weights: dict[str, mx.array], before: str, layers: int, **arguments: Any
    ) -> dict[str, mx.array]:
        """`weights` as mlx-lm converts those of a model of so many layers: dequantized, experts in
        one array, and the like. `before` comes before their names in such a model; `arguments` are
        its own, where they differ.
        """
        small = copy.copy(self.text)
        small.args = copy.copy(small.args)
        vars(small.args).update({"num_hidden_layers": layers} | arguments)
        sane = small.sanitize({before + name: one for name, one in weights.items()})
        return {name.removeprefix(before): one for name, one in sane.items()}


class BackboneTrunk(Trunk):
    """As `Trunk`, of a model that has its own names for its parts (Nemotron-H)."""

    @property
    def body(self) -> Any:
        return self.text.backbone

    @property
    def embeddings(self) -> Any:
        return self.body.embeddings


class WordTrunk(Trunk):
    """As `Trunk`, of a model that calls its embeddings so (Ling)."""

    @property
    def embeddings(self) -> Any:
        return self.body.word_embeddings


class BareTrunk(Trunk):
    """To the states before its last norm."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._layers = copy.copy(self.body)  # the same layers
        self._layers.norm = Identity()

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        states: mx.array = self._layers(tokens, cache=cache)
        return states

    def project(self, states: mx.array) -> mx.array:
        return self.output(self.body.norm(states))
