"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019).

RoBERTa counts positions from behind the padding token's id. Parameters have the names of published
checkpoints, shortened.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.nn.layers.activations import gelu, gelu_approx, relu, silu
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm
from mlx_lm.models.base import BaseModelArgs

from mlx_server.engine.cpu import activations as cpu
from mlx_server.engine.memory import device_name

Activation = Callable[[mx.array], mx.array]

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": gelu,
    "gelu_new": gelu_approx,
    "gelu_pytorch_tanh": gelu_approx,
    "relu": relu,
    "silu": silu,
}
PREFIXES = ("bert.", "roberta.", "encoder.", "embeddings.")
RENAMED = (
    ("attention.self.", "attention."),
    ("attention.output.dense.", "attention.output."),
    ("attention.output.LayerNorm.", "attention_norm."),
    ("intermediate.dense.", "up."),
    ("output.dense.", "down."),
    ("output.LayerNorm.", "norm."),
    ("LayerNorm.", "norm."),
    (".gamma", ".weight"),
    (".beta", ".bias"),
    ("layer.", "layers."),
)
HEADS = (
    ("pooler.dense.", "dense."),
    ("classifier.dense.", "dense."),
    ("classifier.out_proj.", "score."),
    ("classifier.", "score."),
)
"""A cross-encoder's, of BERT and of RoBERTa."""
UNUSED = ("pooler.", "cls.", "lm_head.", "position_ids")
"""Heads for other tasks, and a plain range."""


def activation(name: str) -> Activation:
    if name == "gelu" and device_name() == "cpu":
        return cpu.gelu
    return ACTIVATIONS[name]


@dataclass
class EncoderArgs(BaseModelArgs):  # type: ignore[misc]
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int = 0
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"activation {self.hidden_act!r} is not supported")
        if self.position_embedding_type != "absolute":
            raise ValueError(f"{self.position_embedding_type!r} positions are not supported")

    @property
    def first_position(self) -> int:
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def context_length(self) -> int:
        return self.max_position_embeddings - self.first_position


class Attention(Module):
    def __init__(self, args: EncoderArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heads = args.num_attention_heads
        self.query = Linear(args.hidden_size, args.hidden_size)
        self.key = Linear(args.hidden_size, args.hidden_size)
        self.value = Linear(args.hidden_size, args.hidden_size)
        self.output = Linear(args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        q, k, v = (self._by_head(project(x)) for project in (self.query, self.key, self.value))
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.output(mixed.swapaxes(1, 2).flatten(2))

    def _by_head(self, x: mx.array) -> mx.array:
        """(rows, tokens, width) as (rows, heads, tokens, head_dim)."""
        return mx.unflatten(x, -1, (self.heads, -1)).swapaxes(1, 2)


class Layer(Module):
    """The norms come after the sums."""

    def __init__(self, args: EncoderArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attention = Attention(args)
        self.attention_norm = LayerNorm(args.hidden_size, eps=args.layer_norm_eps)
        self.up = Linear(args.hidden_size, args.intermediate_size)
        self.down = Linear(args.intermediate_size, args.hidden_size)
        self.norm = LayerNorm(args.hidden_size, eps=args.layer_norm_eps)
        self._activation = activation(args.hidden_act)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.attention_norm(x + self.attention(x, mask))
        normed: mx.array = self.norm(x + self.down(self._activation(self.up(x))))
        return normed


class Encoder(Module):
    def __init__(self, args: EncoderArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args = args
        self.word_embeddings = Embedding(args.vocab_size, args.hidden_size)
        self.position_embeddings = Embedding(args.max_position_embeddings, args.hidden_size)
        self.token_type_embeddings = Embedding(args.type_vocab_size, args.hidden_size)
        self.norm = LayerNorm(args.hidden_size, eps=args.layer_norm_eps)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]

    def __call__(
        self, tokens: mx.array, lengths: Sequence[int], kinds: mx.array | None = None
    ) -> mx.array:
        """(rows, tokens, width) from `tokens` (rows, tokens), padded on the right. `kinds`: their
        types, 0 if none are given.
        """
        longest = tokens.shape[1]
        positions = mx.arange(longest) + self.args.first_position
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        x = self.norm(x + self.token_type_embeddings(mx.array(0) if kinds is None else kinds))
        mask = None
        if min(lengths) < longest:
            mask = (mx.arange(longest) < mx.array(list(lengths))[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        states: mx.array = x
        return states

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The used weights, renamed."""
        named = ((_name(key), weight) for key, weight in weights.items())
        return {name: weight for name, weight in named if not name.startswith(UNUSED)}


class CrossEncoder(Encoder):
    """Judges pairs of texts by the state of the first token (Nogueira and Cho, 2019)."""

    def __init__(self, args: EncoderArgs) -> None:
        super().__init__(args)
        self.dense = Linear(args.hidden_size, args.hidden_size)
        self.score = Linear(args.hidden_size, 1)

    def scores(self, tokens: mx.array, lengths: Sequence[int], seconds: Sequence[int]) -> mx.array:
        """(rows, 1) in float32; the second text of row i begins at `seconds[i]`."""
        kinds = None
        if self.args.type_vocab_size > 1:
            begins = mx.array(list(seconds))[:, None]
            kinds = (mx.arange(tokens.shape[1]) >= begins).astype(mx.int32)
        first = self(tokens, lengths, kinds)[:, 0]
        scores: mx.array = self.score(mx.tanh(self.dense(first)))
        return scores.astype(mx.float32)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({_head_name(key): weight for key, weight in weights.items()})


def _head_name(key: str) -> str:
    bare = _name(key)
    for old, new in HEADS:
        if bare.startswith(old):
            return new + bare.removeprefix(old)
    return key


def _name(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    for old, new in RENAMED:
        key = key.replace(old, new)
    return key
