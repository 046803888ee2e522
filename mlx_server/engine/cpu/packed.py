"""Products with quantized weights for MLX's CPU device.

MLX unpacks such weights number by number there, at 2 GFLOP/s. ONNX Runtime's `MatMulNBits` reads
4 bits as they lie and computes in float32. For few rows that is up to five times as fast as
float32 weights, of which eight times as many bytes are read; for many it is slower.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from numpy.typing import NDArray

BITS = (4, 8)
GROUPS = (32, 64, 128)
FEWEST_OUTPUTS = 64
"""Some models reach into narrower layers, which cost nothing."""
LIBRARIES = ("onnxruntime", "onnx")
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules that are called one after the other with the same input."""
FEW_ROWS = 4
"""Up to which products with packed weights are not slower, if there are many of these."""
MANY_WEIGHTS = 1 << 21
"""Of fewer, products with several rows are as fast in float32."""
OPERATORS = "com.microsoft"
OPSET, FORMAT = 17, 8
"""Versions of ONNX's operators and files that any ONNX Runtime of these years reads."""
FLOAT32 = 1
"""The operator's `accuracy_level` at which it computes in float32."""


def available() -> bool:
    return all(find_spec(library) is not None for library in LIBRARIES)


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


def products(model: Any) -> "dict[str, Product | Share]":
    """What multiplies by the quantized weights of a model's modules, by their names. Reads these
    weights, one after the other.
    """
    modules = {name: module for name, module in model.named_modules() if can_pack(module)}
    found: dict[str, Product | Share] = {}
    for name in modules:
        parent, _, own = name.rpartition(".")
        names = next((names for names in TOGETHER if own in names), (own,))
        together = [modules.get(f"{parent}.{other}") for other in names]
        if None in together or len({_form(module) for module in together}) > 1:
            found[name] = Product(modules[name])
        elif own == names[0]:
            shared = Shared(together)
            found |= {f"{parent}.{other}": Share(shared, i) for i, other in enumerate(names)}
    return found


def use(model: Any, products: "Mapping[str, Product | Share]") -> None:
    """Have modules multiply so: those that are quantized still, always, and those dequantized
    since then, for few rows. Calls evaluate, so they must not be traced (`mx.compile`,
    `mx.grad`).
    """
    modules = dict(model.named_modules())
    for name, product in products.items():
        module = modules[name]
        module.product = product
        module.__class__ = REPLACED[type(module)]
        if isinstance(module, PackedLinear):
            for part in ("weight", "scales", "biases"):
                module.pop(part)


def _form(module: Any) -> tuple[int, int, int]:
    """Modules of one form and one input can be multiplied by at once."""
    return module.bits, module.group_size, module.scales.shape[1]


class Product:
    """x @ w.T of affinely quantized modules' weights (outputs, inputs), one after the other."""

    def __init__(self, *modules: Any) -> None:
        import onnxruntime

        weight, scales, biases = (
            mx.concatenate([module[part] for module in modules])
            for part in ("weight", "scales", "biases")
        )
        bits = modules[0].bits
        outputs, groups = scales.shape
        inputs = weight.shape[1] * 32 // bits
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        numbers = np.array(weight).view(np.uint8).reshape(outputs, groups, -1)
        # The operator takes 8 off each number; that and MLX's biases are a product of their own.
        if bits == 4:
            parts = {"weight": numbers, "scales": _flat(scales)}
            offsets = biases + 8 * scales
        else:
            parts = {
                "weight": _nibbles(numbers & 15),
                "scales": _flat(scales),
                "high_weight": _nibbles(numbers >> 4),
                "high_scales": _flat(16 * scales),
            }
            offsets = biases + (8 + 8 * 16) * scales
        parts["offsets"] = np.ascontiguousarray(np.array(offsets.T))
        self.bytes = sum(part.nbytes for part in parts.values())
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(part) for part in parts.values()]
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.enable_cpu_mem_arena = False
        options.add_external_initializers(list(parts), values)
        _share_threads()
        self.outputs = outputs
        self.few_rows = FEW_ROWS if outputs * inputs >= MANY_WEIGHTS else 1
        self._session = onnxruntime.InferenceSession(
            _graph(outputs, inputs, groups, bits), options, providers=["CPUExecutionProvider"]
        )

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

    def __init__(self, modules: Sequence[Any]) -> None:
        self._product = Product(*modules)
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


def _flat(array: mx.array) -> NDArray[Any]:
    return np.array(array).reshape(-1)


def _nibbles(numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Two numbers below 16 in a byte, the first of them low."""
    return np.ascontiguousarray(numbers[..., ::2] | (numbers[..., 1::2] << 4))


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


@cache
def _share_threads() -> None:
    """One pool for all products of the process."""
    import onnxruntime

    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1
    onnxruntime.set_global_thread_pool_sizes(int(threads), 1)


@cache
def _graph(outputs: int, inputs: int, groups: int, bits: int) -> bytes:
    """y (rows, outputs) of x (rows, inputs); the weights are given apart."""
    from onnx import TensorProto, helper

    size = inputs // groups
    halves = ("", "high_")[: bits // 4]
    weights, nodes = [], []
    for half in halves:
        names = f"{half}weight", f"{half}scales"
        weights += [
            _given(names[0], TensorProto.UINT8, (outputs, groups, size // 2)),
            _given(names[1], TensorProto.FLOAT, (outputs * groups,)),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", *names], [f"{half}product"], domain=OPERATORS,
                K=inputs, N=outputs, bits=4, block_size=size, accuracy_level=FLOAT32,
            )
        )  # fmt: skip
    weights += [
        _given("offsets", TensorProto.FLOAT, (groups, outputs)),
        helper.make_tensor("by_group", TensorProto.INT64, (3,), [-1, groups, size]),
        helper.make_tensor("last", TensorProto.INT64, (1,), [2]),
    ]
    nodes += [
        helper.make_node("Reshape", ["x", "by_group"], ["grouped"]),
        helper.make_node("ReduceSum", ["grouped", "last"], ["sums"], keepdims=0),
        helper.make_node("MatMul", ["sums", "offsets"], ["shift"]),
        helper.make_node("Sum", [*(f"{half}product" for half in halves), "shift"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])
    operators = [helper.make_opsetid("", OPSET), helper.make_opsetid(OPERATORS, 1)]
    graph = helper.make_graph(nodes, "product", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=operators, ir_version=FORMAT)
    return cast(bytes, model.SerializeToString())


def _given(name: str, kind: int, shape: Sequence[int]) -> Any:
    """A tensor whose numbers are not in the graph."""
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=name)
    return tensor
