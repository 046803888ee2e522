"""Makes float32 copies of a quantized MLX model, so that every server gets the same weights.

    python -m benchmarks.float32 weights|scales MODEL_FOLDER TARGET_FOLDER

`weights` dequantizes the model. `scales` keeps its quantized weights and makes the rest float32:
MLX's CPU back end multiplies by quantized weights some thirty times slower in float16.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model, load, save


def convert_weights(source: Path, target: Path) -> None:
    """Writes `source`, dequantized to float32, as `target`."""
    model, tokenizer, config = load(str(source), return_config=True)
    model = dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    _save(source, target, model, tokenizer, config)


def convert_scales(source: Path, target: Path) -> None:
    """Writes `source`, its quantized weights as they are and all else float32, as `target`."""
    _save(source, target, *load(str(source), return_config=True))


def _save(source: Path, target: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    """Saves the model with float32 parameters; `target` appears whole or not at all."""
    model.update(tree_map(_as_float32, model.parameters()))
    config["torch_dtype"] = "float32"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        save(made, source, model, tokenizer, config)
        shutil.move(made, target)


def _as_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


CONVERSIONS = {"weights": convert_weights, "scales": convert_scales}


def main() -> None:
    """Entry point of the process."""
    kind, source, target = sys.argv[1:]
    CONVERSIONS[kind](Path(source), Path(target))


if __name__ == "__main__":
    main()
