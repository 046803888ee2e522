"""Libraries for agents, the real ones, in the same part: read, edit, run, finish."""

from pathlib import Path

import pytest

from tests.clients.installing import Npm, Python, Wanted
from tests.clients.stage import Run, Stage
from tests.clients.test_agents import INSTALLS
from tests.support.bert import build_tiny_bert
from tests.support.rehearsal import Call, Play

pytestmark = pytest.mark.soak

SCRIPTS = Path(__file__).parent / "scripts"
PROMPT = "Make greet say good morning, then run it."
GOODBYE = "The greeting is changed, and I ran it."
COMMAND = ["python3", "-c", "import greet; print(greet.greet())"]
PLAY = Play(
    (
        Call("read_file", {"path": "greet.py"}),
        Call("edit_file", {"path": "greet.py", "old": "hello", "new": "good morning"}),
        Call("run_command", {"command": COMMAND, "output": "said.txt"}),
        GOODBYE,
    )
)
LANGCHAIN = Python(
    (
        "langchain==1.5.2",
        "langgraph==1.2.24",
        "langchain-openai==1.7.4",
        "langchain-anthropic==1.7.10",
    ),
    ("3.12", "3.11"),
)
PYTHON: dict[str, tuple[str, Wanted]] = {
    "langchain": ("lang", LANGCHAIN),
    "langgraph": ("lang", LANGCHAIN),
    "litellm": ("litellm", Python(("litellm==1.110.2",), ("3.12", "3.11"))),
    "pydantic": ("pyd", Python(("pydantic-ai-slim[openai,anthropic]==2.68.0",), ("3.12", "3.11"))),
}
AI_SDK = Npm(
    (
        "ai@7.0.173",
        "@ai-sdk/openai-compatible@3.0.92",
        "@ai-sdk/anthropic@4.0.105",
        "@ai-sdk/openai@4.0.118",
        "zod@4.6.7",
    )
)
JAVASCRIPT = Npm(("ollama@0.6.4", "cohere-ai@8.1.0"))
FAMILIES = {"openai": "llama3", "anthropic": "qwen3", "responses": "qwen3-coder"}


@pytest.fixture(autouse=True)
def file(stage: Stage) -> None:
    (stage.work / "greet.py").write_text("def greet():\n    return 'hello'\n")


def assert_played(stage: Stage, run: Run) -> None:
    assert run.went_well(), run
    assert GOODBYE in run.output, run
    assert (stage.work / "greet.py").read_text() == "def greet():\n    return 'good morning'\n"
    assert (stage.work / "said.txt").read_text() == "good morning\n"
    print(run)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("library", PYTHON)
def test_python(stage: Stage, library: str, provider: str) -> None:
    commands = stage.install(*PYTHON[library])
    model = stage.cast(f"play-{provider}", PLAY, FAMILIES[provider])
    script = str(SCRIPTS / f"{library}_agent.py")
    command = [str(commands / "python"), script, model, stage.server.url, provider, PROMPT]
    # It would ask a host outside for prices.
    assert_played(stage, stage.run(command, commands, LITELLM_LOCAL_MODEL_COST_MAP="True"))


@pytest.mark.parametrize("provider", FAMILIES)
def test_ai_sdk(stage: Stage, provider: str) -> None:
    commands = stage.install("ai", AI_SDK)
    model = stage.cast(f"play-{provider}", PLAY, FAMILIES[provider])
    script = str(SCRIPTS / "ai_sdk_agent.mjs")
    command = [str(commands / "node"), script, model, stage.server.url, provider, PROMPT]
    assert_played(stage, stage.run(command, commands, PACKAGES=str(commands.parent.parent)))


@pytest.fixture(scope="module")
def encoders(models: Path) -> None:
    build_tiny_bert(models / "embedder")
    build_tiny_bert(models / "judge", scores=True)


@pytest.mark.usefixtures("encoders")
def test_ollama_in_javascript(stage: Stage) -> None:
    commands = stage.install("js", JAVASCRIPT)
    model = stage.cast("ollama-play", PLAY, "qwen3")
    command = [str(commands / "node"), str(SCRIPTS / "ollama_agent.mjs")]
    command += [model, stage.server.url, "embedder", PROMPT]
    run = stage.run(command, commands, PACKAGES=str(commands.parent.parent))
    assert run.code == 0, run
    assert GOODBYE in run.output, run
    assert (stage.work / "said.txt").read_text() == "good morning\n"
    assert {status for _, _, status in run.requests} == {200, 404}
    print(run)


@pytest.mark.usefixtures("encoders")
def test_cohere_in_javascript(stage: Stage) -> None:
    commands = stage.install("js", JAVASCRIPT)
    command = [str(commands / "node"), str(SCRIPTS / "cohere_rerank.mjs"), "judge"]
    run = stage.run([*command, stage.server.url], commands, PACKAGES=str(commands.parent.parent))
    assert run.went_well(), run
    assert run.requests
    print(run)


def test_llm(stage: Stage) -> None:
    commands = stage.install(*INSTALLS["llm"])
    model = stage.cast("llm-play", PLAY, "llama3")
    tools = str(SCRIPTS / "tools.py")
    assert_played(stage, stage.launch("llm", model, commands, "--functions", tools, PROMPT))
