"""Loading a model folder."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import (
    _get_classes,
    dequantize_model,
    get_total_parameters,
    load_model,
)

from mlx_server.dimensions import head_weights
from mlx_server.engine.memory import DeviceMemory, device_name
from mlx_server.engine.protocol import LoadOptions
from mlx_server.engine.ranks.sharing import ALONE, Ranks
from mlx_server.engine.run.patches import leave_out_generation_config

FLOAT32_BYTES = 4
EXTRA = re.compile(r"Received \d+ parameters not in model: \n(?P<names>.*)\.", re.DOTALL)
MISSING = re.compile(r"Missing \d+ parameters: \n(?P<names>.*)\.", re.DOTALL)
ENCODER = re.compile(r"(^|[._])(vision|visual|audio|image|vit|mm|multi_modal)[._]")
SHOWN = 3

Classes = Callable[[dict[str, Any]], tuple[type, type]]
"""From config.json to the classes of a model and of its arguments."""


class ModelError(Exception):
    """The model folder cannot be loaded."""


def load_weights(
    path: Path, options: LoadOptions, classes: Classes = _get_classes
) -> tuple[Any, dict[str, Any]]:
    """The model, its weights not read yet, and its config. Raises ModelError."""
    leave_out_generation_config()
    try:
        model, config = load_model(
            path,
            lazy=True,
            get_model_classes=_headless(classes),
            trust_remote_code=options.trust_remote_code,
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"config.json is not valid JSON: {error}") from error
    except FileNotFoundError as error:
        raise ModelError(f"a file is missing: {error}") from error
    except SystemExit as error:  # olmo's way of asking for a package
        raise ModelError("its architecture needs a Python package that is not installed") from error
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(_in_short(error)) from error
    return model, config


def _headless(classes: Classes) -> Classes:
    """The same without weights of heads, for which mlx-lm has no place.

    It leaves them out itself, but for those of Qwen3-Next that have been converted.
    """

    def get_classes(config: dict[str, Any]) -> tuple[type, type]:
        whole, arguments = classes(config)
        beginning = head_weights(config)
        if beginning is None:
            return whole, arguments
        of_head = beginning.match

        class Headless(whole):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                own = {name: one for name, one in weights.items() if not of_head(name)}
                sane: dict[str, mx.array] = super().sanitize(own)
                return sane

        Headless.__name__, Headless.__module__ = whole.__name__, whole.__module__
        return Headless, arguments

    return get_classes


def _in_short(error: Exception) -> str:
    """MLX names each of a thousand tensors that do not fit."""
    if (extra := EXTRA.fullmatch(str(error))) is not None:
        names = extra["names"].split(",\n")
        whose = "of a picture or sound encoder, " if any(map(ENCODER.search, names)) else ""
        return (
            f"its weights hold {len(names)} tensors {whose}for which its model_type has no place, "
            f"such as {', '.join(names[:SHOWN])}"
        )
    if (missing := MISSING.fullmatch(str(error))) is not None:
        names = missing["names"].split(",\n")
        return f"its weights lack {len(names)} tensors, such as {', '.join(names[:SHOWN])}"
    return f"{type(error).__name__}: {error}"


def as_computed(
    model: Any, options: LoadOptions, memory: DeviceMemory, ranks: Ranks = ALONE
) -> tuple[Any, bool]:
    """`model` in the format it is computed in, and whether that was changed to float32."""
    if options.dequantize == "packed":
        model.set_dtype(mx.float32)  # all but what is quantized
        return model, False
    if not ranks.agreed(_wants_float32(options, model, memory, ranks.size)):
        return model, False
    # Scales first, so that weights are what products with packed ones multiply by.
    model.set_dtype(mx.float32)
    return dequantize_model(model), True


def _wants_float32(options: LoadOptions, model: Any, memory: DeviceMemory, ranks: int) -> bool:
    """On a CPU float32 runs several times faster than any narrower format."""
    if options.dequantize != "auto":
        return options.dequantize in ("always", "both")
    needed = int(get_total_parameters(model)) * FLOAT32_BYTES // ranks
    return device_name() == "cpu" and needed < memory.limit


def read_weights(model: Any) -> int:
    """Returns bytes."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for array in arrays.values():
        mx.eval(array)  # one by one, so that what a part is cut from does not stay
    return sum(array_sizes(model))


def array_sizes(model: Any) -> list[int]:
    """Bytes of each weight."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return [array.nbytes for array in arrays.values()]


def body_classes(config: dict[str, Any]) -> tuple[type, type]:
    """A decoder without its output projection.

    Called with tokens (rows, tokens) and lengths, it gives (rows, tokens, width).
    """
    whole, arguments = _get_classes(config)

    class Body(whole):  # type: ignore[misc, valid-type]
        def __call__(self, tokens: mx.array, lengths: Sequence[int]) -> mx.array:
            # Attention is causal, so padding on the right changes nothing.
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
