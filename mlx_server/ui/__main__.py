"""The page's process: `python -m mlx_server.ui FD`. It ends when its socket to the front closes."""

import asyncio
import logging
import socket
import sys

import msgspec
import uvicorn

from mlx_server.engine.spawn import give_way, leave_group
from mlx_server.ui.app import build


class Start(msgspec.Struct):
    """What the front says first: where to listen, and the URL of its API."""

    socket: str
    server: str


class PageServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, front: socket.socket) -> None:
        super().__init__(config)
        self._front = front

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._front.sendall(b"listening\n")
            self._watching = asyncio.create_task(self._watch_front())

    async def _watch_front(self) -> None:
        self._front.setblocking(False)
        await asyncio.get_running_loop().sock_recv(self._front, 1)
        self.force_exit = self.should_exit = True


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    leave_group()
    give_way()
    front = socket.socket(fileno=int(sys.argv[1]))
    with front.makefile("rb") as lines:
        start = msgspec.json.decode(lines.readline(), type=Start)
    config = uvicorn.Config(
        build(start.server),
        uds=start.socket,
        access_log=False,
        server_header=False,
        log_config=None,
        # The browser is mostly this machine's own.
        ws_per_message_deflate=False,
        # Seconds, more than the 5 after which the front closes a connection that it does not use:
        # whoever is asked on one must not be about to close it.
        timeout_keep_alive=60,
    )
    PageServer(config, front).run()


if __name__ == "__main__":
    main()
