"""Services: what launchd and systemd read, and what they are told, in the order that works."""

import json
import plistlib
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from mlx_server.cli.options import CommandError
from mlx_server.cli.service import managers
from mlx_server.cli.service.managers import Launchd, Systemd
from mlx_server.cli.service.units import LABEL, Service, launchd_plist, systemd_unit
from tests.support.command import environment, refusal, run

__all__ = ["environment"]
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >>"$(dirname "$0")/calls"
"""
AWKWARD = {"HF_TOKEN": 'a "b" 100% $HOME \\', "HF_HOME": "/a b"}


@pytest.fixture
def service(tmp_path: Path) -> Service:
    command = ["/bin/sh", "-m", "mlx_server", "serve", "--model", "a b"]
    return Service(command, tmp_path / "logs" / "server.log", AWKWARD)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file where stand-ins of the systems' commands note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("launchctl", "systemctl"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "calls"


def test_launchd_starts_at_login_again_after_failures_and_logs_to_a_file_that_rotates(
    service: Service,
) -> None:
    told = plistlib.loads(launchd_plist(service))
    assert told["Label"] == LABEL
    assert told["RunAtLoad"] is True
    assert told["KeepAlive"] == {"SuccessfulExit": False}
    assert told["ProgramArguments"] == [*service.command, "--log-file", str(service.log)]
    assert told["EnvironmentVariables"] == AWKWARD
    assert Path(told["StandardErrorPath"]).parent == service.log.parent
    assert told["StandardErrorPath"] != str(service.log)


def test_systemd_starts_at_login_and_again_after_failures(service: Service) -> None:
    lines = systemd_unit(service).splitlines()
    assert {"Restart=on-failure", "WantedBy=default.target", "KillMode=mixed"} <= set(lines)
    assert 'ExecStart="/bin/sh" "-m" "mlx_server" "serve" "--model" "a b"' in lines
    assert 'Environment="HF_HOME=/a b"' in lines
    assert 'Environment="HF_TOKEN=a \\"b\\" 100%% $HOME \\\\"' in lines


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_systemd_finds_nothing_wrong_with_the_unit(service: Service, tmp_path: Path) -> None:
    unit = tmp_path / "mlx-server.service"
    unit.write_text(systemd_unit(service))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == [], done.stderr


def test_systemd_is_told_to_read_enable_and_restart_and_to_forget(
    service: Service, calls: Path, tmp_path: Path
) -> None:
    systemd = Systemd(tmp_path / "units" / "mlx-server.service")
    systemd.install(service)
    assert stat.S_IMODE(systemd.file.stat().st_mode) == 0o600
    systemd.remove()
    assert not systemd.file.exists()
    assert [line.split()[2:] for line in calls.read_text().splitlines()] == [
        ["daemon-reload"],
        ["enable", "mlx-server.service"],
        ["restart", "mlx-server.service"],
        ["disable", "--now", "mlx-server.service"],
        ["daemon-reload"],
    ]


def test_launchd_is_told_to_take_the_new_agent_and_to_forget_it(
    service: Service, calls: Path, tmp_path: Path
) -> None:
    launchd = Launchd(tmp_path / "agents" / "agent.plist")
    launchd.install(service)
    launchd.install(service)
    assert plistlib.loads(launchd.file.read_bytes())["Label"] == LABEL
    assert service.log.parent.is_dir()
    launchd.remove()
    assert not launchd.file.exists()
    done = [line.split()[1] for line in calls.read_text().splitlines()]
    assert done == ["bootstrap", "bootout", "bootstrap", "bootout"]


def test_the_command_installs_tells_and_removes(
    environment: dict[str, str],
    calls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment |= {"PATH": f"{calls.parent}:/usr/bin:/bin", "HF_TOKEN": "mine"}
    unit = Systemd(tmp_path / "mlx-server.service")
    monkeypatch.setattr("mlx_server.cli.service.command.manager", lambda: unit)
    assert "not installed" in refusal(environment, "service", "remove")
    assert "not installed" in run(environment, "service", "status").stdout
    done = run(environment, "service", "install", "--model", "mine", "--port", "9000")
    assert done.returncode == 0, done.stderr
    assert "listens on port 9000" in done.stdout
    text = unit.file.read_text()
    assert '"serve" "--model" "mine" "--port" "9000"' in text
    assert 'Environment="HF_TOKEN=mine"' in text
    assert json.loads(run(environment, "service", "status", "--json").stdout)["installed"]
    assert "is removed" in run(environment, "service", "remove").stdout


def test_without_a_service_manager_it_says_so(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(managers.sys, "platform", "linux")
    environment["PATH"] = str(tmp_path)
    line = refusal(environment, "service", "install")
    assert "neither launchd nor systemd" in line


@pytest.mark.parametrize("installed", [False, True])
def test_a_service_that_the_system_does_not_take_leaves_everything_as_it_was(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    refusing = tmp_path / "bin" / "systemctl"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho 'Failed to connect to bus: No medium found' >&2; exit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{refusing.parent}:/usr/bin:/bin")
    systemd = Systemd(tmp_path / "mlx-server.service")
    if installed:
        systemd.file.write_text("the one before")
    with pytest.raises(CommandError, match="no systemd session here"):
        systemd.install(service)
    assert systemd.file.exists() is installed
    assert not installed or systemd.file.read_text() == "the one before"
