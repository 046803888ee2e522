"""Start a process of ours, with a socket to it."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

NICENESS = 5
BUFFER_BYTES = 1 << 20
"""Of a socket, each way: macOS gives 8 KiB, which a prompt fills many times over."""


class Process(Protocol):
    """As much of `asyncio.subprocess.Process` as those need who have started one."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    @property
    def stderr(self) -> asyncio.StreamReader | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, signal: int) -> None:
        """Raises ProcessLookupError."""

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Child:
    process: Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    leads_group: bool = False

    async def kill(self) -> None:
        """With all that it has started in its group."""
        if self.process.returncode is None:
            self.kill_group()
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self.process.wait()
        self.writer.close()

    def kill_group(self) -> None:
        """The process may have ended, if something that it has started has not: only so long is
        the group's number surely its own.
        """
        if self.leads_group:
            # It may not have left the front's group yet; macOS refuses a group of the dead.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


async def spawn(module: str, sockets: Sequence[socket.socket] = ()) -> Child:
    """Run `module` with the numbers of its end of a socketpair and of `sockets` as arguments.

    Standard error is a pipe to read. The child calls `leave_group` first and ends when its socket
    closes.
    """
    front, child = socket_pair()
    with child:
        inherited = [child.fileno(), *(one.fileno() for one in sockets)]
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                module,
                *map(str, inherited),
                pass_fds=inherited,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except BaseException:
            front.close()
            raise
    front.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=front)
    return Child(process, reader, writer, leads_group=True)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends with large buffers, as far as the system permits."""
    ends = socket.socketpair()
    for end in ends:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, buffer, BUFFER_BYTES)
    return ends


def leave_group() -> None:
    """Leave the front's process group, which Ctrl-C signals."""
    os.setpgid(0, 0)


def give_way() -> None:
    """Let the front's event loop go first when all processors are busy.

    A session of its own would undo that on Linux, which shares processors between sessions first.
    There each thread has a niceness of its own, and those that BLAS has started by now would go
    before the threads that they wait for.
    """
    niceness = os.nice(NICENESS)
    if sys.platform.startswith("linux"):
        for thread in psutil.Process().threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread.id, niceness)


async def next_line(stream: asyncio.StreamReader) -> bytes:
    """A line longer than the reader's limit comes in pieces."""
    try:
        return await stream.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
