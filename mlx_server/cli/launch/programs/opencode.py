"""OpenCode."""

import json
from pathlib import Path

from mlx_server.cli.launch.program import Program, Setup, Target


def _set_up(target: Target, folder: Path) -> Setup:
    limit = {"context": target.context, "output": target.output}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlx-server",
        "options": {"baseURL": target.openai_url, "apiKey": target.key},
        "models": {target.model: {"name": target.model, "tool_call": True, "limit": limit}},
    }
    model = f"mlx-server/{target.model}"
    config = {"model": model, "small_model": model, "provider": {"mlx-server": provider}}
    # Laid over the user's own configuration.
    return Setup({"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


PROGRAM = Program(
    name="opencode",
    title="OpenCode",
    executable="opencode",
    install="npm install -g opencode-ai",
    needs=8_000,
    recommended=64_000,
    set_up=_set_up,
)
