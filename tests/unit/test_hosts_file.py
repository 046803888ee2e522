"""Files of hosts, and what is run over ssh for them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlx_server.cli.doctor.hosts import link_finding, seconds_of_sum
from mlx_server.engine.protocol import Nccl, Rdma
from mlx_server.models.hosts.hostfile import HostFile, HostsFileError, Machine, NoDevice
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
        ({"backend": "gloo", "hosts": TWO}, "gloo is none of ring, jaccl, jaccl-ring, nccl"),
        ({"backend": "mpi", "hosts": TWO}, "mpirun starts all ranks, and starts none again"),
        ({"backend": "jaccl", "hosts": TWO}, "`rdma` of mac1 has to list a device for each host"),
        ({"envs": ["A B=c"], "hosts": TWO}, "matching regex"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, content: Any, why: str) -> None:
    with pytest.raises(HostsFileError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"hosts file {tmp_path / 'hosts.json'}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def macs(around: bool) -> list[dict[str, Any]]:
    """Four, each with a cable to the next one and, unless that is all, one to each other."""
    return [
        {
            "ssh": f"mac{one}",
            "ips": [f"10.0.0.{one + 1}"],
            "rdma": [
                None if one == other or (around and (one - other) % 4 == 2) else f"rdma_en{other}"
                for other in range(4)
            ],
        }
        for one in range(4)
    ]


def test_devices_for_rdma_are_those_between_the_machines_that_take_ranks(tmp_path: Path) -> None:
    mesh = read(tmp_path, {"backend": "jaccl", "hosts": macs(around=False)})
    assert mesh.fabric(["mac3", "mac1"]) == Rdma(
        [
            [None, "rdma_en3", "rdma_en1"],
            ["rdma_en0", None, "rdma_en1"],
            ["rdma_en0", "rdma_en3", None],
        ],
        around=False,
    )
    with pytest.raises(NoDevice, match="lists no RDMA devices of it") as caught:
        mesh.fabric(["mac1", "elsewhere"])
    assert caught.value.host == "elsewhere"
    assert read(tmp_path, {"backend": "ring", "hosts": macs(around=False)}).fabric(["mac1"]) is None
    assert read(tmp_path, {"backend": "nccl", "hosts": TWO}).fabric(["me@mac2"]) == Nccl()


def test_in_a_ring_neighbours_alone_need_devices(tmp_path: Path) -> None:
    ring = read(tmp_path, {"backend": "jaccl-ring", "hosts": macs(around=True)})
    found = ring.fabric(["mac1", "mac2", "mac3"])
    assert found is not None
    assert found.around
    assert found.devices[0] == [None, "rdma_en1", None, "rdma_en3"]
    with pytest.raises(NoDevice, match="lists no RDMA device from mac0 to mac2"):
        ring.fabric(["mac2", "mac3"])


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
    said = link_finding("a", "b", good, 2).detail
    assert "would wait 6.7 ms for each token divided by heads, 0.2 ms by layers" in said
    by_rdma = link_finding("a", "b", good, 2, rdma=True).detail
    assert "2.0 ms for each token divided by heads, by RDMA, which is not measured here" in by_rdma
    assert link_finding("a", "b", poor, 2).verdict == "warn"
