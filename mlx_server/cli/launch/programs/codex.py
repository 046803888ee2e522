"""Codex CLI."""

import json
from pathlib import Path
from typing import Any

from mlx_server.cli.launch.program import Program, Setup, Target

INSTRUCTIONS = (
    "You are a coding agent in the user's terminal. Look at files before you change them, change "
    "them with apply_patch, run commands to check your work, and end with a short account of it."
)
"""It has none for models that it does not know."""
CATALOG = "models.json"
KEY = "MLX_SERVER_LAUNCH_KEY"


def _set_up(target: Target, folder: Path) -> Setup:
    settings = {
        "model_provider": "mlx-server",
        "model_providers.mlx-server.name": "mlx-server",
        "model_providers.mlx-server.base_url": target.openai_url,
        "model_providers.mlx-server.env_key": KEY,
        "model_providers.mlx-server.wire_api": "responses",
        "model_context_window": target.context,
        "model_catalog_json": str(folder / CATALOG),
    }
    # A JSON string or number is TOML too.
    options = (("-c", f"{name}={json.dumps(value)}") for name, value in settings.items())
    arguments = ("--model", target.model, *(part for option in options for part in option))
    catalog = {"models": [_description(target)]}
    return Setup({KEY: target.key}, arguments, {CATALOG: json.dumps(catalog, indent=2)})


def _description(target: Target) -> dict[str, Any]:
    """It asks for all of these."""
    return {
        "slug": target.model,
        "display_name": target.model,
        "context_window": target.context,
        "shell_type": "unified_exec",
        "apply_patch_tool_type": "freeform",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "truncation_policy": {"mode": "bytes", "limit": 10_000},
        "input_modalities": ["text"],
        "base_instructions": INSTRUCTIONS,
        "support_verbosity": False,
        "supports_parallel_tool_calls": True,
        "supports_reasoning_summaries": False,
        "supported_reasoning_levels": [],
        "experimental_supported_tools": [],
    }


PROGRAM = Program(
    name="codex",
    title="Codex CLI",
    executable="codex",
    install="npm install -g @openai/codex",
    needs=5_500,
    recommended=64_000,
    set_up=_set_up,
)
