"""Coding agents, the real programs, edit a file as a model in rehearsal tells them."""

import json

import pytest

from mlx_server.cli.launch.program import Target
from mlx_server.cli.launch.programs import PROGRAMS
from tests.clients.installing import Npm, Python, Wanted
from tests.clients.stage import Run, Stage
from tests.support.rehearsal import Call, Play

pytestmark = pytest.mark.soak

BEFORE = "def greet():\n    return 'hello'\n"
AFTER = "def greet():\n    return 'good morning'\n"
PROMPT = "Make greet say good morning, then run it."
CHECK = 'python3 -c "import greet; print(greet.greet())" > said.txt'
GOODBYE = "The greeting is changed, and I ran it."


INSTALLS: dict[str, tuple[str, Wanted]] = {
    "claude": ("claude", Npm(("@anthropic-ai/claude-code@2.1.332",))),
    "codex": ("codex", Npm(("@openai/codex@0.171.0",))),
    "opencode": ("opencode", Npm(("opencode-ai@1.18.33",))),
    "qwen": ("qwen", Npm(("@qwen-code/qwen-code@0.24.4",))),
    "aider": ("aider", Python(("aider-chat==0.86.2",), ("3.12", "3.11"))),
    "llm": ("llm", Python(("llm==0.36",), ("3.12", "3.11"))),
}
"""By the name that `launch` has for it."""


@pytest.fixture(autouse=True)
def file(stage: Stage) -> None:
    (stage.work / "greet.py").write_text(BEFORE)


def assert_edited(stage: Stage) -> None:
    assert (stage.work / "greet.py").read_text() == AFTER


def assert_done(stage: Stage, run: Run) -> None:
    print(run)
    assert run.went_well(), run
    assert GOODBYE in run.output
    assert_edited(stage)
    assert (stage.work / "said.txt").read_text() == "good morning\n"


def test_claude_code(stage: Stage) -> None:
    commands = stage.install(*INSTALLS["claude"])
    path = str(stage.work / "greet.py")
    change = {"file_path": path, "old_string": "hello", "new_string": "good morning"}
    play = Play(
        (
            Call("Read", {"file_path": path}),
            Call("Edit", change),
            Call("Bash", {"command": CHECK, "description": "Run it"}),
            GOODBYE,
        )
    )
    model = stage.cast("claude-play", play)
    allowed = ("--allowedTools", "Read,Edit,Bash", "--output-format", "text")
    run = stage.launch("claude", model, commands, "-p", PROMPT, *allowed)
    assert_done(stage, run)


def test_opencode(stage: Stage) -> None:
    commands = stage.install(*INSTALLS["opencode"])
    path = str(stage.work / "greet.py")
    change = {"filePath": path, "oldString": "hello", "newString": "good morning"}
    play = Play(
        (
            Call("read", {"filePath": path}),
            Call("edit", change),
            Call("bash", {"command": CHECK, "description": "Run it"}),
            GOODBYE,
        )
    )
    model = stage.cast("opencode-play", play, "glm4.5")
    run = stage.launch("opencode", model, commands, "run", PROMPT)
    assert_done(stage, run)


def test_qwen_code(stage: Stage) -> None:
    commands = stage.install(*INSTALLS["qwen"])
    path = str(stage.work / "greet.py")
    change = {"file_path": path, "old_string": "hello", "new_string": "good morning"}
    play = Play(
        (
            Call("read_file", {"file_path": path}),
            Call("edit", change),
            Call(
                "run_shell_command",
                {"command": CHECK, "description": "Run it", "is_background": False},
            ),
            GOODBYE,
        )
    )
    model = stage.cast("qwen-play", play, "qwen3-coder")
    run = stage.launch("qwen", model, commands, "--yolo", "-p", PROMPT)
    assert_done(stage, run)


def test_aider(stage: Stage) -> None:
    commands = stage.install(*INSTALLS["aider"])
    block = (
        "I change the greeting.\n\ngreet.py\n```python\n<<<<<<< SEARCH\n    return 'hello'\n"
        "=======\n    return 'good morning'\n>>>>>>> REPLACE\n```\n"
    )
    model = stage.cast("aider-play", Play((block,)))
    options = ("--yes-always", "--no-git", "--no-check-update", "--no-analytics")
    edit = ("--edit-format", "diff", "--message", PROMPT, "greet.py")
    run = stage.launch("aider", model, commands, *options, *edit)
    assert run.went_well(), run
    assert_edited(stage)
    print(run)


def test_codex(stage: Stage) -> None:
    commands = stage.install(*INSTALLS["codex"])
    change = "from pathlib import Path; file = Path('greet.py'); text = file.read_text()"
    change = f"python3 -c \"{change}; file.write_text(text.replace('hello', 'good morning'))\""
    play = Play(
        (
            Call("exec_command", {"cmd": "cat greet.py"}),
            Call("exec_command", {"cmd": change}),
            Call("exec_command", {"cmd": CHECK}),
            GOODBYE,
        )
    )
    model = stage.cast("codex-play", play)
    # The grammar of its patches would make a rehearsed model lose its text.
    setup = PROGRAMS["codex"].set_up(Target(stage.server.url, "key", model, 131072), stage.user)
    catalog = json.loads(setup.files["models.json"])
    del catalog["models"][0]["apply_patch_tool_type"]
    (stage.user / "models.json").write_text(json.dumps(catalog))
    options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    options += ["-c", f"model_catalog_json={json.dumps(str(stage.user / 'models.json'))}"]
    run = stage.launch("codex", model, commands, "exec", *options, PROMPT)
    assert_done(stage, run)
