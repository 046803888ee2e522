"""The programs with the demo model, whose context is small: no server-side error, whatever it says.

What does not fit is refused, which the program tells its user.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_server.cli.launch.program import Target
from mlx_server.cli.launch.programs import PROGRAMS
from tests.clients.stage import Stage
from tests.clients.test_agents import INSTALLS
from tests.support.demo import MODEL, demo_model
from tests.support.server import Server, serving

__all__ = ["demo_model"]

pytestmark = pytest.mark.soak

PROMPT = "What is the capital of France? Answer in one word."
ASKING: dict[str, tuple[str, ...]] = {
    "claude": ("-p", PROMPT),
    "codex": ("exec", "--skip-git-repo-check", PROMPT),
    "opencode": ("run", PROMPT),
    "aider": (
        *("--yes-always", "--no-git", "--no-check-update", "--no-analytics"),
        *("--message", PROMPT),
    ),
    "qwen": ("-p", PROMPT),
    "llm": ("-o", "max_tokens", "64", PROMPT),
}
CONTEXT = 4096
SECONDS = 1200
"""Some have the model summarise what does not fit, as long as it likes."""


@pytest.fixture(scope="module")
def demo_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("demo")
    (home / "models").symlink_to(demo_model.parent, target_is_directory=True)
    with serving(home, "--model", MODEL, context_length=CONTEXT) as server:
        yield server


@pytest.mark.parametrize("program", ASKING)
def test_no_program_makes_the_server_fail(
    demo_server: Server, installs: Path, tmp_path: Path, program: str
) -> None:
    stage = Stage(demo_server, tmp_path, installs, tmp_path / "user")
    stage.work.mkdir(parents=True)
    commands = stage.install(*INSTALLS[program])
    folder = tmp_path / "run"
    folder.mkdir()
    # Without `launch`, which would refuse most of them.
    setup = PROGRAMS[program].set_up(Target(demo_server.url, "key", MODEL, CONTEXT), folder)
    for name, content in setup.files.items():
        (folder / name).write_text(content)
    command = [PROGRAMS[program].executable, *setup.arguments, *ASKING[program]]
    command[0] = str(commands / command[0])
    run = stage.run(command, commands, seconds=SECONDS, **setup.environment)
    print(run)
    assert run.requests
    assert all(status in range(200, 500) for _, _, status in run.requests), run
