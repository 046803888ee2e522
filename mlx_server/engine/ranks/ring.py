"""MLX's ring of TCP connections between neighbouring ranks.

It is neither encrypted nor does it ask who connects. MLX stops listening once all have joined.
"""

import faulthandler
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from mlx_server.engine.ranks.messages import Addresses

LOOPBACK = "127.0.0.1"
JOIN_SECONDS = 20.0
"""For all ranks to join, after which this process ends: MLX waits for ever, and holds Python's lock
meanwhile, so that nothing else would notice that a rank is gone."""


class RingError(Exception):
    """The ranks cannot be connected."""


def free_addresses(hosts: Iterable[str]) -> Addresses:
    """A port of each of `hosts`, addresses of this machine; all of them were free a moment ago.
    Raises RingError.
    """
    with ExitStack() as stack:
        found = []
        for host in hosts:
            one = stack.enter_context(socket.socket())
            try:
                one.bind((host, 0))
            except OSError as error:
                raise RingError(f"{host} is no address of this machine") from error
            found.append(f"{host}:{one.getsockname()[1]}")
        return found


def join(
    rank: int, ranks: list[Addresses], announce: Callable[[], None] = lambda: None
) -> mx.distributed.Group:
    """Connect to the neighbours, all of whom do the same now. Raises RingError.

    `announce` is called at the last moment: the last rank connects to rank 0 first, and if nobody
    listens there yet it tries again a second later.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps(ranks))
        os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
        announce()
        try:
            return mx.distributed.init(strict=True, backend="ring")
        except RuntimeError as error:
            where = ", ".join(ranks[rank])
            raise RingError(f"rank {rank} cannot listen on {where}: {error}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
