"""Commands as people meet them: at a terminal of 80 columns, in pipes, with Ctrl-C."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.server.conftest import MODEL
from tests.support.command import COMMAND, refusal, run
from tests.support.server import Server, logged, serving

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")

PROMPT = re.escape("\x1b[?2004h")
"""The editor takes keys: it has asked for pastes to be marked."""

ANSWERING = re.escape("\x1b[?2004l") + ".*?" + re.escape("\x1b[?25l")
"""The editor has ended, and an answer hides the cursor."""


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    """Of a user whose server is the shared one."""
    port = server.url.rpartition(":")[2]
    own = {"MLX_SERVER_PORT": port, "MLX_SERVER_HOME": str(tmp_path / "home"), "TERM": "xterm"}
    own |= {"HF_HUB_CACHE": str(tmp_path / "cache")}
    # pexpect's terminal does not say where its cursor is.
    own |= {"PROMPT_TOOLKIT_NO_CPR": "1"}
    return {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | own


@contextlib.contextmanager
def terminal(environment: dict[str, str], *arguments: str) -> Iterator["pexpect.spawn[str]"]:
    """The command at a terminal, ended in the end."""
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *arguments],
        env=environment,
        dimensions=(24, 80),
        timeout=60,
        encoding="utf-8",
        codec_errors="replace",
    )
    try:
        yield child
    finally:
        child.close(force=True)


def test_a_chat_answers_stops_at_ctrl_c_knows_commands_and_ends_at_ctrl_d(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with terminal(environment, "chat", "--max-tokens", "8") as child:
        child.expect(f"{MODEL} at .*Ctrl-D leaves")
        child.expect(PROMPT)
        child.send("hello\x1b\rthere\r")
        child.expect(r"8 tokens, .*first after [\d.]+ s, ended by length")
        child.expect(PROMPT)
        child.send("/set max_tokens 1500\r")
        child.expect("max_tokens is 1500")
        child.expect(PROMPT)
        child.send("and a long answer\r")
        child.expect(ANSWERING)
        child.sendintr()
        child.expect("stopped")
        child.expect(PROMPT)
        child.send("/nothing\r")
        child.expect("there is no /nothing")
        child.expect(PROMPT)
        child.sendeof()
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
    history = tmp_path / "home" / "chat_history"
    assert "+hello\n+there\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_a_chat_in_a_pipe_is_the_answer_alone(environment: dict[str, str]) -> None:
    arguments = ("chat", "--max-tokens", "8", "--temperature", "0", "What is it?")
    whole = run(environment, *arguments, "--json", given="a file")
    answer = json.loads(whole.stdout)
    assert answer["tokens"] == 8
    assert answer["model"] == MODEL
    assert run(environment, *arguments, given="a file").stdout == answer["text"] + "\n"


def test_a_chat_follows_a_schema(environment: dict[str, str]) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    done = run(environment, "chat", "--schema", json.dumps(schema), "go", "--max-tokens", "200")
    assert json.loads(done.stdout) == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("chat", "--model", "tiny-lama", "hi"), f"Close: {MODEL}."),
        (("chat", "--schema", "{", "hi"), "the schema is no JSON"),
        (("chat",), "there is no question"),
        (("bench", "--concurrency", "some"), "is no list such as 1,4,16"),
        (("bench", "--url", "localhost"), "is no address such as http"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(
    environment: dict[str, str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in refusal(environment, *arguments)


@pytest.mark.parametrize("command", [("chat", "hi"), ("ps",), ("bench",)])
def test_without_a_server_a_command_says_how_to_start_one(
    environment: dict[str, str], command: tuple[str, ...]
) -> None:
    line = refusal(environment | {"MLX_SERVER_PORT": "9"}, *command)
    assert "start one with `mlx-server serve`" in line


def test_models_are_watched_within_80_columns_until_ctrl_c(environment: dict[str, str]) -> None:
    with terminal(environment | {"NO_COLOR": "1"}, "ps", "--watch") as child:
        child.expect(f"{MODEL}.*ready.*\r\n")
        child.expect(f"{MODEL}.*ready.*\r\n")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
        assert isinstance(child.before, str)
        lines = re.split(r"[\r\n]+", ESCAPES.sub("", child.before))
    assert max(map(len, lines)) <= 80
    (model,) = json.loads(run(environment, "ps", "--json").stdout)
    assert (model["id"], model["state"]) == (MODEL, "ready")


def test_a_bench_measures_each_level_and_says_what_limits(environment: dict[str, str]) -> None:
    arguments = ("bench", "--concurrency", "2,1", "--prompt-tokens", "8", "--max-tokens", "8")
    report = json.loads(run(environment, *arguments, "--json").stdout)
    assert [level["concurrency"] for level in report["levels"]] == [1, 2]
    assert all(level["output_rate"] > 0 and not level["errors"] for level in report["levels"])
    assert report["limit"]
    shown = run(environment | {"COLUMNS": "80"}, *arguments, "--requests", "1").stdout
    assert "What limits it:" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_serve_tells_what_is_where_shows_models_as_they_load_and_logs_to_a_file(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "server.log"
    own = {"MLX_SERVER_PORT": "0", "MLX_SERVER_LOG_FILE": str(log)}
    with terminal(environment | own, "serve", "--model", str(tiny_model)) as child:
        child.expect(r"mlx-server \S+ answers at http://127.0.0.1:(\d+) ")
        assert "event" not in child.before
        for name in ("API", "models", "memory", "next"):
            child.expect(name)
        child.expect(f"{MODEL} is ready after .*context 2,048")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
    assert logged(log.read_text(), "stopping")


def test_what_is_typed_during_an_answer_is_not_shown_and_waits_for_the_next_question(
    environment: dict[str, str],
) -> None:
    # Drawn answers of a random model end by chance before that.
    with terminal(environment, "chat", "--max-tokens", "300", "--temperature", "0") as child:
        child.expect(PROMPT)
        child.send("go on\r")
        child.expect(ANSWERING)
        child.send("typed ahead")
        child.expect("ended by length")
        assert isinstance(child.before, str)
        assert "typed ahead" not in child.before
        child.expect(PROMPT)
        child.expect("typed ahead")


def test_a_question_waits_for_a_model_that_loads_longer_than_the_server_waits(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    folder = str(tiny_model.parent)
    options = {"load_wait": 0.01, "model_dirs": [folder]}
    with serving(tmp_path / "slow", **options) as slow:
        port = slow.url.rpartition(":")[2]
        greedy = ("--max-tokens", "8", "--temperature", "0")
        asked = ("chat", "--port", port, "-m", MODEL, *greedy, "hi")
        done = run(environment, *asked)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip()
        answers = [one["status"] for one in logged(slow.log.read_text(), "request")]
    assert answers.count(503) >= 1
