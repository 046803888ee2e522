"""aider."""

import json
from pathlib import Path

from mlx_server.cli.launch.program import Program, Setup, Target

METADATA = "model-metadata.json"


def _set_up(target: Target, folder: Path) -> Setup:
    model = f"openai/{target.model}"
    facts = {
        "max_input_tokens": target.context,
        "max_output_tokens": target.output,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
    arguments = (
        *("--model", model, "--weak-model", model),
        *("--model-metadata-file", str(folder / METADATA)),
        "--no-show-model-warnings",
    )
    environment = {"OPENAI_API_BASE": target.openai_url, "OPENAI_API_KEY": target.key}
    return Setup(environment, arguments, {METADATA: json.dumps({model: facts}, indent=2)})


PROGRAM = Program(
    name="aider",
    title="aider",
    executable="aider",
    install="pip install aider-chat",
    needs=2_000,
    recommended=16_000,
    set_up=_set_up,
)
