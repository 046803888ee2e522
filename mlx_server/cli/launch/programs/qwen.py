"""Qwen Code."""

from pathlib import Path

from mlx_server.cli.launch.program import Program, Setup, Target


def _set_up(target: Target, folder: Path) -> Setup:
    environment = {
        "OPENAI_BASE_URL": target.openai_url,
        "OPENAI_API_KEY": target.key,
        "OPENAI_MODEL": target.model,
    }
    return Setup(environment, ("--auth-type", "openai", "--model", target.model))


PROGRAM = Program(
    name="qwen",
    title="Qwen Code",
    executable="qwen",
    install="npm install -g @qwen-code/qwen-code",
    needs=15_000,
    recommended=64_000,
    set_up=_set_up,
)
