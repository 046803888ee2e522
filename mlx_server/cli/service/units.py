"""What launchd and systemd are told. Pure: nothing is written or run here."""

import plistlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LABEL = "io.github.mlx-server"
UNIT = "mlx-server.service"
RESTART_SECONDS = 5
STOP_SECONDS = 75
"""For requests to finish (`grace_period`) and engines to let go of the device."""
FILES = 8192
"""Open files: connections and models."""


@dataclass(frozen=True)
class Service:
    """`command` is absolute; `log` is where launchd has the server write."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def launchd_plist(service: Service) -> bytes:
    """A launch agent: begins with the login, and again after a failure, but not after `stop`.

    `launchd.plist(5)`.
    """
    # The log rotates itself; what comes before and beside it is little.
    output = str(service.log.with_name("console.log"))
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": [*service.command, "--log-file", str(service.log)],
            "EnvironmentVariables": dict(service.environment),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RESTART_SECONDS,
            "ExitTimeOut": STOP_SECONDS,
            # Others are throttled: processor, disk, and with them the tokens.
            "ProcessType": "Interactive",
            "SoftResourceLimits": {"NumberOfFiles": FILES},
            "StandardOutPath": output,
            "StandardErrorPath": output,
        }
    )


def systemd_unit(service: Service) -> str:
    """A user unit: begins with the login, and again after a failure. journald keeps and rotates
    its log. `systemd.service(5)`.
    """
    environment = [
        f"Environment={_quoted(f'{name}={value}')}" for name, value in service.environment.items()
    ]
    return "\n".join(
        [
            "[Unit]",
            "Description=mlx-server, an inference server for MLX language models",
            "After=network.target",
            # After a few failures it goes on trying.
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            f"ExecStart={' '.join(_quoted(part).replace('$', '$$') for part in service.command)}",
            *environment,
            "Restart=on-failure",
            f"RestartSec={RESTART_SECONDS}",
            # Engines end with the server; it ends them itself when it is told to stop.
            "KillMode=mixed",
            f"TimeoutStopSec={STOP_SECONDS}",
            f"LimitNOFILE={FILES}",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def _quoted(text: str) -> str:
    """As systemd reads a word, with its own escapes."""
    escapes = {"\\": "\\\\", '"': '\\"', "%": "%%", "\n": "\\n"}
    return '"' + "".join(escapes.get(char, char) for char in text) + '"'
