"""Parts of a model as ONNX Runtime computes them, in float32, on rows (rows, width).

Its `MatMulNBits` reads weights of 4 bits as they lie.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.normalization import RMSNorm
from numpy.typing import NDArray

LIBRARIES = ("onnxruntime", "onnx")
OPERATORS = "com.microsoft"
OPSET, FORMAT = 17, 8
"""Versions of ONNX's operators and files that any ONNX Runtime of these years reads."""
FLOAT32 = 1
"""The operator's `accuracy_level` at which it computes in float32."""
WIDE = "rows"
"""The name of the dimension that is not known beforehand."""


def available() -> bool:
    return all(find_spec(library) is not None for library in LIBRARIES)


class Graph:
    """Nodes are added one after the other; each gives the name of what it makes."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._given: list[Any] = []
        self._arrays: dict[str, NDArray[Any]] = {}
        self._names = 0
        self.bytes = 0
        """Of what products multiply by."""

    def node(
        self, operator: str, inputs: Sequence[str], domain: str = "", outputs: int = 1, **more: Any
    ) -> list[str]:
        from onnx import helper

        names = [self._name() for _ in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, names, domain=domain, **more))
        return names

    def given(self, array: NDArray[Any]) -> str:
        """Weights, which are not written into the graph."""
        from onnx import TensorProto, helper

        name = self._name()
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(
            name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL
        )
        tensor.external_data.add(key="location", value=name)
        self._given.append(tensor)
        self._arrays[name] = np.ascontiguousarray(array)
        return name

    def product(self, x: str, modules: Sequence[Any]) -> str:
        """x @ w.T of affinely quantized modules' weights (outputs, inputs), one after the other.
        All have one form.
        """
        weight, scales, biases = (
            mx.concatenate([module[part] for module in modules])
            for part in ("weight", "scales", "biases")
        )
        bits = modules[0].bits
        outputs, groups = scales.shape
        inputs = weight.shape[1] * 32 // bits
        size = inputs // groups
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        numbers = np.array(weight).view(np.uint8).reshape(outputs, groups, -1)
        # The operator takes 8 off each number; that and MLX's biases are a product of their own.
        if bits == 4:
            parts = [(numbers, scales)]
            offsets = biases + 8 * scales
        else:
            parts = [(_nibbles(numbers & 15), scales), (_nibbles(numbers >> 4), 16 * scales)]
            offsets = biases + (8 + 8 * 16) * scales
        found = []
        for low_or_high, scale in parts:
            weights = self._weights(low_or_high), self._weights(np.array(scale).reshape(-1))
            found += self.node(
                "MatMulNBits", [x, *weights], OPERATORS,
                K=inputs, N=outputs, bits=4, block_size=size, accuracy_level=FLOAT32,
            )  # fmt: skip
        [grouped] = self.node("Reshape", [x, self._constant([-1, groups, size])])
        [sums] = self.node("ReduceSum", [grouped, self._constant([2])], keepdims=0)
        found += self.node("MatMul", [sums, self._weights(np.array(offsets.T))])
        [y] = self.node("Sum", found)
        return y

    def linear(self, x: str, modules: Sequence[Any]) -> str:
        """The same with the modules' own biases, if any."""
        y = self.product(x, modules)
        if not any("bias" in module for module in modules):
            return y
        biases = [
            module.get("bias", mx.zeros(module.scales.shape[0])).astype(mx.float32)
            for module in modules
        ]
        [y] = self.node("Add", [y, self.given(np.array(mx.concatenate(biases)))])
        return y

    def norm(self, x: str, module: RMSNorm) -> str:
        weight = self.given(np.array(module.weight.astype(mx.float32)))
        [y] = self.node("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=module.eps)
        return y

    def swiglu(self, gate: str, x: str) -> str:
        [activated] = self.node("QuickGelu", [gate], OPERATORS, alpha=1.0)
        [y] = self.node("Mul", [activated, x])
        return y

    def split(self, x: str, widths: Sequence[int]) -> list[str]:
        return self.node("Split", [x, self._constant(widths)], outputs=len(widths), axis=-1)

    def session(self, inputs: Mapping[str, int], outputs: Sequence[str]) -> Any:
        """An `onnxruntime.InferenceSession`; `inputs` have these widths."""
        import onnxruntime
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            "part",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [WIDE, width])
                for name, width in inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self._given,
        )
        operators = [helper.make_opsetid("", OPSET), helper.make_opsetid(OPERATORS, 1)]
        model = helper.make_model(graph, opset_imports=operators, ir_version=FORMAT)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.enable_cpu_mem_arena = False
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(one) for one in self._arrays.values()]
        options.add_external_initializers(list(self._arrays), values)
        _share_threads()
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _weights(self, array: NDArray[Any]) -> str:
        self.bytes += array.nbytes
        return self.given(array)

    def _constant(self, numbers: Sequence[int]) -> str:
        from onnx import TensorProto, helper

        name = self._name()
        tensor = helper.make_tensor(name, TensorProto.INT64, (len(numbers),), list(numbers))
        self._given.append(tensor)
        return name

    def _name(self) -> str:
        self._names += 1
        return f"n{self._names}"


def form(module: Any) -> tuple[int, int, int]:
    """Modules of one form and one input can be multiplied by at once."""
    return module.bits, module.group_size, module.scales.shape[1]


def drop_weights(module: Any) -> None:
    """Of a quantized module, which nothing computes with any more."""
    for part in ("weight", "scales", "biases"):
        module.pop(part)


def _nibbles(numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Two numbers below 16 in a byte, the first of them low."""
    return np.ascontiguousarray(numbers[..., ::2] | (numbers[..., 1::2] << 4))


@cache
def _share_threads() -> None:
    """One pool for all sessions of the process."""
    import onnxruntime

    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1
    onnxruntime.set_global_thread_pool_sizes(int(threads), 1)
