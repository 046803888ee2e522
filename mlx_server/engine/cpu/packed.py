"""Products with quantized weights for MLX's CPU device.

MLX unpacks such weights number by number there, at 2 GFLOP/s. ONNX Runtime's `MatMulNBits` reads
4 bits as they lie and computes in float32. For few rows that is up to five times as fast as
float32 weights, of which eight times as many bytes are read; for many it is slower.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from numpy.typing import NDArray

from mlx_server.engine.cpu.blocks import FEW_ROWS as BLOCK_ROWS
from mlx_server.engine.cpu.blocks import PARTS, Block, alike, is_layer, use_block
from mlx_server.engine.cpu.graph import Graph, drop_weights, form

BITS = (4, 8)
GROUPS = (32, 64, 128)
FEWEST_OUTPUTS = 64
"""Some models reach into narrower layers, which cost nothing."""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules that are called one after the other with the same input."""
FEW_ROWS = 4
"""Up to which products with packed weights are not slower, if there are many of these."""
MANY_WEIGHTS = 1 << 21
"""Of fewer, products with several rows are as fast in float32."""


def can_pack(module: Module) -> bool:
    """Whether `Product` can multiply by its weights."""
    return (
        type(module) in (QuantizedLinear, QuantizedEmbedding)
        and module.mode == "affine"
        and module.bits in BITS
        and module.group_size in GROUPS
        and module.scales.ndim == 2
        and module.scales.shape[0] >= FEWEST_OUTPUTS
    )


def products(model: Any) -> "dict[str, Product | Share | Block]":
    """What multiplies by the quantized weights of a model's modules, by their names. Reads these
    weights, one after the other.
    """
    modules = {name: module for name, module in model.named_modules() if can_pack(module)}
    found: dict[str, Product | Share | Block] = {}
    for name, layer in model.named_modules():
        parts = [f"{name}.{part}" for part in PARTS] if is_layer(layer) else []
        if parts and all(part in modules for part in parts) and alike(layer):
            found[name] = Block(layer)
            for part in parts:
                del modules[part]
    # Threads of both libraries would wait for each other if they took turns.
    few_rows = BLOCK_ROWS if found else None
    for name in modules:
        parent, _, own = name.rpartition(".")
        names = next((names for names in TOGETHER if own in names), (own,))
        together = [modules.get(f"{parent}.{other}") for other in names]
        if None in together or len({form(module) for module in together}) > 1:
            found[name] = Product(modules[name], few_rows=few_rows)
        elif own == names[0]:
            shared = Shared(together, few_rows)
            found |= {f"{parent}.{other}": Share(shared, i) for i, other in enumerate(names)}
    return found


def most_rows(products: "Mapping[str, Product | Share | Block]", *, narrow: bool) -> int:
    """Up to which some of them are used: any if weights are `narrow` otherwise, too."""
    blocks = any(isinstance(product, Block) for product in products.values())
    most = sys.maxsize if narrow else BLOCK_ROWS if blocks else FEW_ROWS
    return most if products else 0


def use(model: Any, products: "Mapping[str, Product | Share | Block]") -> None:
    """Have modules multiply so: those that are quantized still, always, and those dequantized
    since then, for few rows. Calls evaluate, so they must not be traced (`mx.compile`,
    `mx.grad`).
    """
    modules = dict(model.named_modules())
    for name, product in products.items():
        module = modules[name]
        if isinstance(product, Block):
            use_block(module, product)
            continue
        module.product = product
        module.__class__ = REPLACED[type(module)]
        if isinstance(module, PackedLinear):
            drop_weights(module)


class Product:
    """x @ w.T of affinely quantized modules' weights (outputs, inputs), one after the other."""

    def __init__(self, *modules: Any, few_rows: int | None = None) -> None:
        graph = Graph()
        y = graph.product("x", modules)
        self.bytes = graph.bytes
        self.outputs = sum(module.scales.shape[0] for module in modules)
        inputs = modules[0].scales.shape[1] * modules[0].group_size
        usual = FEW_ROWS if self.outputs * inputs >= MANY_WEIGHTS else 1
        self.few_rows = few_rows or usual
        self._session = graph.session({"x": inputs}, [y])

    def __call__(self, x: mx.array) -> mx.array:
        """(..., outputs) from `x` (..., inputs), in the dtype of `x`."""
        return mx.array(self.rows(x)).reshape(*x.shape[:-1], self.outputs).astype(x.dtype)

    def rows(self, x: mx.array) -> NDArray[np.float32]:
        """(rows, outputs)"""
        wide = x.astype(mx.float32).reshape(-1, x.shape[-1])
        mx.eval(wide)
        (found,) = self._session.run(None, {"x": np.array(wide, copy=False)})
        return cast(NDArray[np.float32], found)


class Shared:
    """The product of several modules' weights and an input that all of them are called with."""

    def __init__(self, modules: Sequence[Any], few_rows: int | None) -> None:
        self._product = Product(*modules, few_rows=few_rows)
        self._ends = list(itertools.accumulate(module.scales.shape[0] for module in modules))
        self._x: mx.array | None = None
        self._parts: list[NDArray[np.float32]] = []

    @property
    def bytes(self) -> int:
        return self._product.bytes

    @property
    def few_rows(self) -> int:
        return self._product.few_rows

    def part(self, index: int, x: mx.array) -> mx.array:
        """Of the module at `index`; computed for all when the first of them asks."""
        if self._x is not x:
            self._x, self._parts = x, np.split(self._product.rows(x), self._ends[:-1], axis=1)
        part = mx.array(self._parts[index]).reshape(*x.shape[:-1], -1).astype(x.dtype)
        if index == len(self._ends) - 1:
            self._x, self._parts = None, []
        return part


@dataclass(frozen=True, slots=True)
class Share:
    shared: Shared
    index: int

    @property
    def bytes(self) -> int:
        return 0 if self.index else self.shared.bytes

    @property
    def few_rows(self) -> int:
        return self.shared.few_rows

    def __call__(self, x: mx.array) -> mx.array:
        return self.shared.part(self.index, x)


def _few(x: mx.array, product: "Product | Share") -> bool:
    return x.size <= product.few_rows * x.shape[-1]


def _with_bias(linear: Any, x: mx.array) -> mx.array:
    product: mx.array = linear.product(x)
    return product + linear["bias"] if "bias" in linear else product


class PackedLinear(QuantizedLinear):
    """Without weights of its own."""

    def __call__(self, x: mx.array) -> mx.array:
        return _with_bias(self, x)


class PackedEmbedding(QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        product: mx.array = self.product(x)
        return product


class FewRowsLinear(Linear):
    """With float32 weights for more rows."""

    def __call__(self, x: mx.array) -> mx.array:
        return _with_bias(self, x) if _few(x, self.product) else super().__call__(x)


class FewRowsEmbedding(Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        multiply = self.product if _few(x, self.product) else super().as_linear
        return cast(mx.array, multiply(x))


REPLACED: dict[type, type] = {
    QuantizedLinear: PackedLinear,
    QuantizedEmbedding: PackedEmbedding,
    Linear: FewRowsLinear,
    Embedding: FewRowsEmbedding,
}
