"""Decoder layers for few rows on a CPU: all but attention in two calls of ONNX Runtime.

A step of a small model is hundreds of products, each of which would wait for MLX's device and
wake the threads that compute it, and rotary embeddings take as long as the products. So the layers
of Llama and what is built like it are computed here: attention too, where each row has one token
and a plain cache.
"""

import sys
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from numpy.typing import NDArray

from mlx_server.engine.cpu.graph import Graph, drop_weights, form
from mlx_server.engine.cpu.one_token import Attention, can_attend

LAYERS = {(f"mlx_lm.models.{family}", "TransformerBlock") for family in ("llama", "qwen2", "qwen3")}
"""Modules and names of classes: x + attention(norm(x)), to which the same of a SwiGLU is added."""
INPUTS, OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
GATED, DOWN = ("gate_proj", "up_proj"), "down_proj"
MLP = (*GATED, DOWN)
PARTS = (*(f"self_attn.{name}" for name in (*INPUTS, OUTPUT)), *(f"mlp.{name}" for name in MLP))
"""All must be quantized in a way that `packed` can multiply by."""

FEW_ROWS = 16
"""Up to which products with packed weights are not slower than in float32."""

Rows = NDArray[np.float32]


class Block:
    """A layer's products and all between them. Up to `few_rows` it is to be used."""

    few_rows = 0

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention[name] for name in INPUTS]
        width = layer.input_layernorm.weight.shape[0]
        first = Graph()
        widths = [one.scales.shape[0] for one in projections]
        normed = first.norm("x", layer.input_layernorm)
        outputs = first.split(first.linear(normed, projections), widths)
        self._first = first.session({"x": width}, outputs)
        second = Graph()
        [between] = second.node("Add", ["x", second.linear("attended", [attention[OUTPUT]])])
        normed = second.norm(between, layer.post_attention_layernorm)
        gated = [mlp[name] for name in GATED]
        inner = gated[0].scales.shape[0]
        gate, up = second.split(second.linear(normed, gated), [inner, inner])
        out = second.linear(second.swiglu(gate, up), [mlp[DOWN]])
        [out] = second.node("Add", [between, out])
        heads = attention[OUTPUT]
        attended = heads.scales.shape[1] * heads.group_size
        self._second = second.session({"x": width, "attended": attended}, [out])
        self.bytes = first.bytes + second.bytes
        self._attention = Attention(attention)
        self._x: mx.array | None = None
        self._parts: list[Rows] = []

    def __call__(self, x: mx.array, mask: Any, cache: Any, attention: Any) -> mx.array:
        """(batch, tokens, width) of the same; `attention` is mlx-lm's, for other caches."""
        if x.shape[1] == 1 and can_attend(cache):
            mx.eval(x)
            attended = self._attention(self._first.run(None, {"x": _rows(x)}), cache)
            return self._rest(x, attended)
        whole = attention(x, mask, cache)
        mx.eval(x, whole)
        return self._rest(x, _rows(whole))

    def takes(self, x: mx.array) -> bool:
        return x.size <= self.few_rows * x.shape[-1]

    def part(self, index: int, x: mx.array) -> mx.array:
        """Queries, keys or values, by `index`; computed when the first of them is asked for."""
        if self._x is not x:
            mx.eval(x)
            self._x, self._parts = x, self._first.run(None, {"x": _rows(x)})
        part = self._parts[index]
        if index == len(self._parts) - 1:
            self._x, self._parts = None, []
        return mx.array(part).reshape(*x.shape[:-1], -1)

    def _rest(self, x: mx.array, attended: Rows) -> mx.array:
        [out] = self._second.run(None, {"x": _rows(x), "attended": attended})
        return mx.array(cast(Rows, out)).reshape(x.shape)


def is_layer(module: Any) -> bool:
    return (type(module).__module__, type(module).__name__) in LAYERS


def alike(layer: Any) -> bool:
    """Whether modules with the same input have one form, so that they are one product."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        len({form(attention[name]) for name in INPUTS}) == 1
        and len({form(mlp[name]) for name in GATED}) == 1
    )


def use_block(layer: Any, block: Block) -> None:
    """Have `layer` be computed so: always, if its weights are quantized still, else for few
    rows. Calls evaluate, so they must not be traced.
    """
    attention, mlp = layer.self_attn, layer.mlp
    quantized = isinstance(attention[OUTPUT], QuantizedLinear)
    block.few_rows = sys.maxsize if quantized else FEW_ROWS
    for index, name in enumerate(INPUTS):
        module = attention[name]
        module.block, module.index = block, index
        module.__class__ = PackedInput if quantized else FewRowsInput
    attention[OUTPUT].block = block
    attention[OUTPUT].__class__ = PackedOutput if quantized else FewRowsOutput
    if quantized:
        for module in (*(attention[name] for name in (*INPUTS, OUTPUT)), *(mlp[n] for n in MLP)):
            drop_weights(module)
    layer.block = block
    layer.__class__ = _in_blocks(type(layer))


class PackedInput(QuantizedLinear):
    """Of what the layer was given, before its norm."""

    def __call__(self, x: mx.array) -> mx.array:
        return cast(mx.array, self.block.part(self.index, x))


class FewRowsInput(Linear):
    def __call__(self, x: mx.array) -> mx.array:
        few = self.block.takes(x)
        return cast(mx.array, self.block.part(self.index, x) if few else super().__call__(x))


class PackedOutput(QuantizedLinear):
    """Computed with what follows."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class FewRowsOutput(Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return x if self.block.takes(x) else super().__call__(x)


def _in_blocks(kind: type) -> type:
    class Layer(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if not self.block.takes(x):
                return cast(mx.array, super().__call__(x, mask, cache))
            return cast(mx.array, self.block(x, mask, cache, self.self_attn))

    Layer.__name__, Layer.__module__ = kind.__name__, kind.__module__
    return Layer


def _rows(x: mx.array) -> Rows:
    return np.array(x, copy=False).reshape(-1, x.shape[-1])
