"""Which models can be computed at all, told from mlx-lm's files: importing it brings MLX along."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_server.engine.protocol import ENCODERS

RENAMED = frozenset(
    {
        *("deepseek_v41_text", "falcon_mamba", "gemma4_unified", "iquestcoder"),
        *("joyai_llm_flash", "kimi_k2", "llava", "minimax_m2", "mistral", "phi-msft"),
        *("qwen2_5_vl", "xverse"),
    }
)
"""Families that mlx-lm computes as others."""
OWN_CODE = "model_file"
"""In config.json: the model brings its architecture."""
MARK = "class ModelArgs"
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def family_fault(config: dict[str, Any]) -> str | None:
    """Why a model is none that generates text or makes vectors."""
    family = str(config.get("model_type"))
    if family in ENCODERS or config.get(OWN_CODE):
        return None
    if not (family in RENAMED or _is_computed(family)):
        return f"its type, {family[:100]}, is none that mlx-lm computes"
    kinds = config.get("architectures")
    if isinstance(kinds, list) and any(str(kind).endswith(CLASSIFIERS) for kind in kinds):
        return f"it classifies texts ({kinds[0]}) and writes none"
    return None


@cache
def _is_computed(family: str) -> bool:
    spec = find_spec("mlx_lm")
    places = spec.submodule_search_locations if spec else None
    if not places or Path(family).name != family:
        return False
    try:
        return MARK in (Path(places[0]) / "models" / f"{family}.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
