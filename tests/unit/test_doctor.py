"""`doctor`: each problem is found, and says how it is mended."""

import json
import socket
import sys
from pathlib import Path

import pytest

from mlx_server.cli.doctor import machine, surroundings
from mlx_server.config import Settings
from mlx_server.engine.protocol import Device
from tests.support.command import environment, run
from tests.support.store import make_model

__all__ = ["environment"]
GB = 1_000_000_000


def settings(tmp_path: Path, **more: object) -> Settings:
    return Settings(home=tmp_path / "home", **more)  # type: ignore[arg-type]


def safetensors(file: Path, data: int, claimed: int) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [claimed], "data_offsets": [0, claimed]}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"x" * data)


def test_everything_is_checked_and_every_problem_has_its_fix(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = run(environment, "doctor", "--json", "--port", port)
    findings = {one["check"]: one for one in json.loads(done.stdout)}
    assert {"versions", "device", "memory", "disk", "models", "port", "hub"} <= findings.keys()
    assert done.returncode == 1
    assert findings["port"]["verdict"] == "fail"
    assert findings["models"]["verdict"] == findings["hub"]["verdict"] == "warn"
    assert [one for one in findings.values() if one["verdict"] != "ok" and not one["fix"]] == []


def test_a_free_port_is_no_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    assert surroundings.port(settings(tmp_path, port=port)).verdict == "ok"


@pytest.mark.parametrize(
    ("data", "claimed", "fault"),
    [(10, 10, None), (9, 10, "instead of"), (11, 10, "instead of")],
)
def test_weights_that_are_cut_off_are_found_by_their_header(
    tmp_path: Path, data: int, claimed: int, fault: str | None
) -> None:
    file = tmp_path / "model.safetensors"
    safetensors(file, data, claimed)
    found = surroundings.cut_off(file)
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)


@pytest.mark.parametrize("content", [b"", b"weights", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert surroundings.cut_off(file)


def test_models_that_cannot_be_served_and_damaged_weights_are_named(tmp_path: Path) -> None:
    ours = settings(tmp_path)
    make_model(ours.models_folder / "damaged")
    make_model(ours.models_folder / "ears", model_type="whisper")
    whole = make_model(ours.models_folder / "whole")
    safetensors(whole / "model.safetensors", 4, 4)
    problems = {one.detail.split()[0]: one for one in surroundings.models(ours)[1:]}
    assert problems.keys() == {"ears", "damaged:"}
    assert problems["damaged:"].verdict == "fail"
    assert all(one.fix and "mlx-server rm" in one.fix for one in problems.values())


@pytest.mark.parametrize(
    ("usable", "limit", "verdict"),
    [(24 * GB, 0, "ok"), (16 * GB, 0, "warn"), (30 * GB, 30_000, "ok"), (24 * GB, None, "ok")],
)
def test_macs_that_keep_memory_from_models_are_told_how_to_give_it(
    usable: int, limit: int | None, verdict: str
) -> None:
    finding = machine.wired(Device("metal", 32 * GB, usable, usable), limit)
    assert finding.verdict == verdict
    assert verdict == "ok" or "iogpu.wired_limit_mb" in str(finding.fix)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux chooses a BLAS")
def test_a_blas_that_is_off_or_missing_is_told(tmp_path: Path) -> None:
    for choice in ("off", str(tmp_path / "none.so")):
        (finding,) = [
            one
            for one in machine.device(settings(tmp_path, openblas=choice))
            if one.check == "BLAS"
        ]
        assert finding.verdict != "ok"
        assert finding.fix
