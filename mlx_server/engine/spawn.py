"""Start a process of ours, with a socket to it."""

import asyncio
import contextlib
import os
import socket
import sys
from dataclasses import dataclass

NICENESS = 5


@dataclass(frozen=True, slots=True)
class Child:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self.process.wait()
        self.writer.close()


async def spawn(module: str) -> Child:
    """Run `module` with the number of its end of a socketpair as the only argument.

    Standard error is a pipe to read. The child calls `step_back` first and ends when its socket
    closes.
    """
    front, child = socket.socketpair()
    with child:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(child.fileno()),
                pass_fds=[child.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except BaseException:
            front.close()
            raise
    front.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=front)
    return Child(process, reader, writer)


def step_back() -> None:
    """Leave the front's process group, and let the front go first.

    Ctrl-C signals the group. With a niceness the event loop gets a processor when all are busy; a
    session of its own would undo that on Linux, which shares processors between sessions first.
    """
    os.setpgid(0, 0)
    os.nice(NICENESS)


async def next_line(stream: asyncio.StreamReader) -> bytes:
    """A line longer than the reader's limit comes in pieces."""
    try:
        return await stream.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
