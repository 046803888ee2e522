"""Files of hosts, and what is run over ssh for them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlx_server.cli.doctor.hosts import link_finding, seconds_of_sum
from mlx_server.models.hosts.hostfile import HostFile, HostsFileError, Machine
from mlx_server.models.hosts.link import Link
from mlx_server.models.hosts.ssh import Place, command

TWO = [{"ssh": "mac1", "ips": ["10.0.0.1"]}, {"ssh": "me@mac2", "ips": ["10.0.0.2"], "rdma": []}]


def read(tmp_path: Path, content: Any) -> HostFile:
    file = tmp_path / "hosts.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return HostFile.read(file)


@pytest.mark.parametrize(
    "content", [TWO, {"hosts": TWO}, {"backend": "ring", "envs": ["A=b=c"], "hosts": TWO}]
)
def test_both_forms_are_read(tmp_path: Path, content: Any) -> None:
    found = read(tmp_path, content)
    assert found.here == Machine("mac1", ["10.0.0.1"])
    assert found.others == (Machine("me@mac2", ["10.0.0.2"]),)
    assert found.envs == (("A=b=c",) if "envs" in content else ())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Input data was truncated"),
        ("{}", "Object missing required field `hosts`"),
        ('[{"ips": []}]', "Object missing required field `ssh`"),
        ([TWO[0]], "fewer than two hosts"),
        ([TWO[0], TWO[0]], "it names mac1 twice"),
        ([TWO[0], {"ssh": "mac2"}], "mac2 has 0 `ips`"),
        ([TWO[0], {"ssh": "mac2", "ips": ["10.0.0.2", "10.0.1.2"]}], "mac2 has 2 `ips`"),
        ([TWO[0], {"ssh": "mac2", "ips": ["mac2.local"]}], "'mac2.local' of mac2 is no IPv4"),
        ([TWO[0], {"ssh": "mac2", "ips": ["fe80::1"]}], "'fe80::1' of mac2 is no IPv4"),
        ([TWO[0], {"ssh": "-oProxyCommand=x", "ips": ["10.0.0.2"]}], "matching regex"),
        ([TWO[0], {"ssh": "mac2; x", "ips": ["10.0.0.2"]}], "matching regex"),
        ({"backend": "jaccl", "hosts": TWO}, "the back end jaccl is not there yet"),
        ({"envs": ["A B=c"], "hosts": TWO}, "matching regex"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, content: Any, why: str) -> None:
    with pytest.raises(HostsFileError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"hosts file {tmp_path / 'hosts.json'}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostsFileError, match="No such file"):
        HostFile.read(tmp_path / "none")


@pytest.mark.parametrize("told", [True, False])
def test_the_command_runs_the_worker_as_it_was_told(tmp_path: Path, told: bool) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    python = tmp_path / "a python"
    python.write_text('#!/bin/sh\npwd; printf "%s\\n" "$X" "$@"\n')
    python.chmod(0o755)
    place = Place(str(python), str(folder), told, "10.0.0.1:32322")
    made = command(Machine("me@mac2", ["10.0.0.2", "10.0.1.2"]), ["X=a 'b' $c"], place)
    assert made[:2] == ["ssh", "-T"]
    assert made[-3:-1] == ["--", "me@mac2"]
    done = subprocess.run(["sh", "-c", made[-1]], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *(str(folder), "a 'b' $c", "-m", "mlx_server", "worker", "--secret-stdin"),
        *("--join", "10.0.0.1:32322", "--name", "me@mac2"),
        *("--address", "10.0.0.2", "--address", "10.0.1.2"),
    ]


def test_a_folder_that_is_not_there_matters_if_it_was_told() -> None:
    for told, code in ((True, 1), (False, 0)):
        place = Place("true", "/nonexistent", told, "10.0.0.1:1")
        script = command(Machine("mac2", ["10.0.0.2"]), [], place)[-1]
        assert subprocess.run(["sh", "-c", script], capture_output=True).returncode == code


def test_what_to_expect_of_a_link() -> None:
    good, poor = Link(98e-6, 1.2e9), Link(3e-3, 5e6)
    assert seconds_of_sum(good, 8192, 2) == pytest.approx(98e-6 + 8192 / 1.2e9)
    assert seconds_of_sum(good, 8192, 3) == pytest.approx(2 * 98e-6 + 4 / 3 * 8192 / 1.2e9)
    assert link_finding("a", "b", good, 2).verdict == "ok"
    assert "would wait 6.7 ms for each token" in link_finding("a", "b", good, 2).detail
    assert link_finding("a", "b", poor, 2).verdict == "warn"
