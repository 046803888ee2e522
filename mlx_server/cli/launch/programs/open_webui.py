"""Open WebUI."""

from pathlib import Path

from mlx_server.cli.launch.program import Program, Setup, Target


def _set_up(target: Target, folder: Path) -> Setup:
    environment = {
        "OPENAI_API_BASE_URL": target.openai_url,
        "OPENAI_API_KEY": target.key,
        "ENABLE_OLLAMA_API": "false",
        "DEFAULT_MODELS": target.model,
        # What it has stored would win over these, and these would be stored.
        "ENABLE_PERSISTENT_CONFIG": "false",
    }
    return Setup(environment, ("serve",))


PROGRAM = Program(
    name="open-webui",
    title="Open WebUI",
    executable="open-webui",
    install="pip install open-webui",
    needs=0,
    recommended=8_000,
    set_up=_set_up,
)
