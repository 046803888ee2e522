"""llm, whose folder is replaced by one with links to all that is in it but its list of models."""

import json
from pathlib import Path

import typer

from mlx_server.cli.launch.program import Program, Setup, Target

MODELS = "extra-openai-models.yaml"
LOGS = "logs.db"


def _set_up(target: Target, folder: Path) -> Setup:
    model = {
        "model_id": target.model,
        "model_name": target.model,
        "api_base": target.openai_url,
        "headers": {"Authorization": f"Bearer {target.key}"},
        "supports_tools": True,
        "supports_schema": True,
    }
    return Setup(
        {"LLM_USER_PATH": str(folder), "LLM_MODEL": target.model},
        # JSON is YAML too.
        files={MODELS: json.dumps([model], indent=2)},
        links=_links(Path(typer.get_app_dir("io.datasette.llm"))),
    )


def _links(own: Path) -> dict[str, Path]:
    if not own.is_dir():
        return {}
    names = {LOGS, *(entry.name for entry in own.iterdir())} - {MODELS}
    return {name: own / name for name in sorted(names)}


PROGRAM = Program(
    name="llm",
    title="llm",
    executable="llm",
    install="pip install llm",
    needs=0,
    recommended=4_000,
    set_up=_set_up,
)
