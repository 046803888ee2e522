"""The command line: quick help, models on the disk, and one clear line per mistake."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_server import __version__
from mlx_server.cli.options import folded
from tests.support.command import COMMAND, environment, refusal, run
from tests.support.hub import Hub, running
from tests.support.store import make_model

COMMANDS = ("serve", "chat", "list", "ps", "pull", "rm", "launch", "bench", "doctor", "config")
__all__ = ["environment"]

TINY = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 1000}


def test_the_version_tells_those_of_mlx_and_mlx_lm(environment: dict[str, str]) -> None:
    line = run(environment, "--version").stdout
    others = r"mlx [\d.]+, mlx-lm [\d.]+, [\w ]+, Python [\d.]+"
    assert re.fullmatch(rf"mlx-server {re.escape(__version__)} \({others}\)\n", line)


def test_a_mistake_ends_the_process_with_one_line(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*COMMAND, "rm", "nothing"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mlx-server: There is no model 'nothing'.\n"


def test_help_names_every_command(environment: dict[str, str]) -> None:
    text = run(environment, "--help").stdout
    assert all(command in text for command in COMMANDS)


def test_no_command_s_line_is_cut_short(environment: dict[str, str]) -> None:
    for group in ((), ("config",), ("service",)):
        assert not re.search(r"[a-z]\.\.\.", run(environment, *group, "--help").stdout)


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, mlx_server.cli.app;"
        "heavy = {'mlx', 'pydantic', 'fastapi', 'uvicorn', 'huggingface_hub', 'httpx2'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (("--port", "99999"), "port"),
        (("--max-batch", "0"), "max_batch"),
        (("--memory-limit", "lots"), "memory_limit"),
        (("--dequantize", "perhaps"), "dequantize"),
        (("--log-level", "loud"), "log_level"),
        (("--context-length", "1"), "context_length"),
        (("--host", "not an address"), "host"),
        (("--api-key", ""), "api_keys"),
    ],
)
def test_a_bad_setting_is_named(
    environment: dict[str, str], arguments: tuple[str, ...], setting: str
) -> None:
    assert f"setting {setting}" in refusal(environment, "serve", *arguments)


def test_a_bad_variable_is_named(environment: dict[str, str]) -> None:
    environment["MLX_SERVER_MAX_BATCH"] = "many"
    assert "setting max_batch" in refusal(environment, "list")


def test_a_variable_that_is_no_list_is_named(environment: dict[str, str]) -> None:
    environment["MLX_SERVER_MODELS"] = "a,b"
    line = refusal(environment, "list")
    assert 'MLX_SERVER_MODELS is no JSON: it wants such as `["ONE", "TWO"]`' in line


def test_a_missing_settings_file_is_reported(environment: dict[str, str], tmp_path: Path) -> None:
    assert "nowhere.toml" in refusal(
        environment, "list", "--config", str(tmp_path / "nowhere.toml")
    )


def test_an_unreadable_settings_file_is_reported(
    environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = = 3")
    assert "settings cannot be read" in refusal(environment, "list", "--config", str(file))


def test_an_unknown_setting_in_the_file_is_named(
    environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("prot = 3")
    assert "setting prot" in refusal(environment, "list", "--config", str(file))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_beyond_this_machine_demands_a_key(
    environment: dict[str, str], host: str
) -> None:
    assert "--api-key" in refusal(environment, "serve", "--host", host, "--port", "0")


def test_a_port_in_use_is_reported_before_anything_is_loaded(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        line = refusal(environment, "serve", "--port", port, "--model", "nothing")
    assert port in line
    assert "in use" in line
    assert "say another --port" in line


def test_an_unknown_model_is_reported(environment: dict[str, str], tmp_path: Path) -> None:
    make_model(tmp_path / "home" / "models" / "llama-tiny")
    line = refusal(environment, "serve", "--port", "0", "--model", "lama-tiny")
    assert "llama-tiny" in line


def test_a_folder_that_is_no_model_is_reported(environment: dict[str, str], tmp_path: Path) -> None:
    line = refusal(environment, "serve", "--port", "0", "--model", str(tmp_path))
    assert "config.json" in line


def test_the_list_shows_what_can_be_served(environment: dict[str, str], tmp_path: Path) -> None:
    make_model(tmp_path / "home" / "models" / "mine", max_position_embeddings=4096)
    make_model(tmp_path / "home" / "models" / "ears", model_type="whisper")
    done = run(environment, "list")
    assert re.search(r"mine +folder +llama +0\.00 GB +4,096", done.stdout)
    assert "ears" not in done.stdout
    assert "ears cannot be served: its type, whisper, is none that mlx-lm computes" in done.stderr


def test_an_empty_list_tells_what_to_do(environment: dict[str, str]) -> None:
    assert "mlx-server pull smollm2-135m" in run(environment, "list").stdout


def test_a_model_is_pulled_and_listed(environment: dict[str, str]) -> None:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 1000}
    with running(Hub({"tiny/llama": files})) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        done = run(environment, "pull", "tiny/llama")
    assert done.returncode == 0, done.stderr
    assert "tiny/llama is ready" in done.stdout
    assert "tiny/llama" in run(environment, "list").stdout


def test_a_failed_pull_is_one_line(environment: dict[str, str]) -> None:
    done = run(environment, "pull", "tiny/llama")
    assert done.returncode != 0
    assert "cannot reach the hub" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_model_is_removed(environment: dict[str, str], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "home" / "models" / "mine")
    done = run(environment, "rm", "mine", "--yes")
    assert (done.returncode, done.stdout) == (0, "mine is removed.\n")
    assert not folder.exists()
    assert "mine" in refusal(environment, "rm", "mine", "--yes")


def test_a_pulled_model_is_removed(environment: dict[str, str], tmp_path: Path) -> None:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 1000}
    with running(Hub({"tiny/llama": files})) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        run(environment, "pull", "tiny/llama")
    assert run(environment, "rm", "tiny/llama", "--yes").returncode == 0
    assert "tiny/llama" not in run(environment, "list").stdout
    assert not (tmp_path / "cache" / "models--tiny--llama").exists()


@pytest.mark.parametrize(("answer", "removed"), [(b"n\n", False), (b"y\n", True)])
def test_removing_is_asked_about_on_a_terminal(
    environment: dict[str, str], tmp_path: Path, answer: bytes, removed: bool
) -> None:
    folder = make_model(tmp_path / "home" / "models" / "mine")
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            [*COMMAND, "rm", "mine"], env=environment, stdin=theirs, capture_output=True, timeout=60
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"Remove mine" in done.stderr
    assert (done.returncode == 0) == removed
    assert folder.exists() != removed


def test_a_folder_of_the_user_is_not_removed(environment: dict[str, str], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mine" / "theirs")
    environment["MLX_SERVER_MODEL_DIRS"] = json.dumps([str(tmp_path / "mine")])
    assert "Remove its folder yourself" in refusal(environment, "rm", "theirs", "--yes")
    assert folder.exists()


def test_ps_without_a_server_is_one_line(environment: dict[str, str]) -> None:
    line = refusal(environment, "ps", "--port", "9")
    assert line.startswith("mlx-server: no server answers at http://127.0.0.1:9: start one with")


@pytest.mark.parametrize(
    "arguments",
    [
        ("ps", "--port", "9"),
        ("chat", "--url", "http://nowhere.invalid/v1", "hi"),
        ("pull", "org/model"),
        ("list", "--config", "/dev/null/config.toml"),
        ("serve", "--port", "0", "--log-file", "/dev/null/server.log"),
    ],
)
def test_the_system_s_reason_is_told_without_its_number(
    environment: dict[str, str], arguments: tuple[str, ...]
) -> None:
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "Errno" not in refusal(environment, *arguments)


def test_a_terminal_gets_whole_words_and_commands_that_can_be_copied() -> None:
    text = folded("mlx-server: say `mlx-server serve --port 1`, or mend it", 30)
    assert text == "mlx-server: say\n`mlx-server serve --port 1`,\nor mend it"


def test_ps_tells_a_stranger_from_a_server(environment: dict[str, str]) -> None:
    with running(Hub({})) as hub:
        line = refusal(environment, "ps", "--port", hub.endpoint.rpartition(":")[2])
    assert "is no mlx-server" in line


def test_a_reader_that_goes_away_leaves_no_traceback(environment: dict[str, str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*COMMAND, "list"], env=environment, stdout=theirs, stderr=subprocess.PIPE, timeout=60
    )
    os.close(theirs)
    assert done.stderr == b""


def test_lists_are_json_for_programs(environment: dict[str, str], tmp_path: Path) -> None:
    make_model(tmp_path / "home" / "models" / "mine", max_position_embeddings=4096)
    make_model(tmp_path / "home" / "models" / "ears", model_type="whisper")
    listed = json.loads(run(environment, "list", "--json").stdout)
    assert [(one["id"], one["context_length"]) for one in listed["models"]] == [("mine", 4096)]
    assert [one["id"] for one in listed["broken"]] == ["ears"]
    removed = json.loads(run(environment, "rm", "mine", "--yes", "--json").stdout)
    assert [one["id"] for one in removed] == ["mine"]


def test_several_models_are_pulled_their_sizes_first_and_one_that_fails_stops_none(
    environment: dict[str, str],
) -> None:
    with running(Hub({"tiny/one": TINY, "tiny/two": TINY})) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        done = run(environment, "pull", "tiny/one", "tiny/nothing", "tiny/two", "--json")
    assert done.returncode == 1
    pulled = json.loads(done.stdout)
    assert [one["model"] for one in pulled if one["error"] is None] == ["tiny/one", "tiny/two"]
    assert {one["size"] for one in pulled} == {sum(map(len, TINY.values())), None}
    sizes = [line for line in done.stderr.splitlines() if re.match("tiny/(one|two): 0.00 GB", line)]
    assert len(sizes) == 2
    assert "the hub has no model tiny/nothing" in done.stderr
    assert "together 0.00 GB to fetch" in done.stderr


def test_the_hub_s_client_draws_no_bars_of_its_own_however_many_are_pulled_at_once(
    environment: dict[str, str],
) -> None:
    names = [f"tiny/{number}" for number in range(8)]
    with running(Hub(dict.fromkeys(names, TINY))) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        said = [run(environment, "pull", *names).stderr for _ in range(2)]
    lines = [line for text in said for line in text.splitlines()]
    assert len(lines) == 2 * (len(names) + 2), lines
    assert all(line.startswith(("tiny/", "together ", "fetching ")) for line in lines)


def test_a_pull_that_is_broken_off_says_so_at_once_and_goes_on_from_there(
    environment: dict[str, str],
) -> None:
    weights = b"weights" * 100_000
    files = TINY | {"model.safetensors": weights}
    with running(Hub({"tiny/one": files}, hold_at=len(weights) // 2)) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        command = [*COMMAND, "pull", "tiny/one"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pull:
            until_fetching(hub, environment)
            pull.send_signal(signal.SIGINT)
            _, errors = pull.communicate(timeout=10)
        assert pull.returncode == 130
        assert "the same command goes on from here" in errors
        hub.release()
        assert run(environment, "pull", "tiny/one").returncode == 0
        first, second = hub.downloads("model.safetensors")
    assert first is None
    assert re.fullmatch(r"bytes=[1-9]\d*-.*", second or "")


def until_fetching(hub: Hub, environment: dict[str, str]) -> None:
    """Some of the weights are on the disk."""
    cache = Path(environment["HF_HUB_CACHE"])
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in cache.rglob("*.incomplete")):
        assert time.monotonic() < deadline, hub.requests
        time.sleep(0.05)


def test_what_is_here_is_not_fetched_again(environment: dict[str, str]) -> None:
    with running(Hub({"tiny/one": TINY})) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        run(environment, "pull", "tiny/one")
        hub.mend()
        done = run(environment, "pull", "tiny/one")
        assert hub.downloads("model.safetensors") == []
    assert "tiny/one: 0.00 GB, all here" in done.stderr


@pytest.mark.parametrize("leftover", ["damaged", "damaged.download.partial"])
def test_what_cannot_be_served_is_removed_too(
    environment: dict[str, str], tmp_path: Path, leftover: str
) -> None:
    folder = tmp_path / "home" / "models" / leftover
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    assert run(environment, "rm", "damaged", "--yes").stdout == "damaged is removed.\n"
    assert not folder.exists()


def test_a_broken_download_from_the_hub_is_removed_by_its_name(
    environment: dict[str, str], tmp_path: Path
) -> None:
    part = tmp_path / "cache" / "models--tiny--llama" / "blobs" / "abc.part.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    assert run(environment, "rm", "tiny/llama", "--yes").returncode == 0
    assert not part.exists()


@pytest.mark.parametrize("name", ["org", "..", "../models", ".", ""])
def test_no_name_removes_more_than_one_model(
    environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    folder = make_model(tmp_path / "home" / "models" / "org" / "one")
    assert "There is no model" in refusal(environment, "rm", "--yes", name)
    assert folder.exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_script_that_they_can_read(environment: dict[str, str], shell: str) -> None:
    script = run(environment, "completion", shell).stdout
    assert "_MLX_SERVER_COMPLETE" in script
    if found := shutil.which(shell):
        done = subprocess.run([found, "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_is_offered_commands_and_models(
    environment: dict[str, str], tmp_path: Path
) -> None:
    make_model(tmp_path / "home" / "models" / "llama-tiny")
    for typed, offered in (("mlx-server be", "bench"), ("mlx-server rm lla", "llama-tiny")):
        asked = {"_MLX_SERVER_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        asked["COMP_CWORD"] = str(len(typed.split()) - 1)
        script = "import sys; sys.argv = ['mlx-server']; import mlx_server.cli.app as a; a.main()"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment | asked,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.split() == [offered], done.stderr
