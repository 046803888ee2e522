"""MLX's ring of TCP connections between neighbouring ranks.

It is neither encrypted nor does it ask who connects. MLX stops listening once all have joined.
"""

import faulthandler
import json
import os
import socket
import tempfile
from collections.abc import Callable
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


def free_addresses(count: int) -> Addresses:
    """On this machine; all of them were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [f"{LOOPBACK}:{one.getsockname()[1]}" for one in sockets]


def join(
    rank: int, addresses: Addresses, announce: Callable[[], None] = lambda: None
) -> mx.distributed.Group:
    """Connect to the neighbours, all of whom do the same now. Raises RingError.

    `announce` is called at the last moment: the last rank connects to rank 0 first, and if nobody
    listens there yet it tries again a second later.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[address] for address in addresses]))
        os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
        announce()
        try:
            return mx.distributed.init(strict=True, backend="ring")
        except RuntimeError as error:
            raise RingError(f"rank {rank} cannot listen on {addresses[rank]}: {error}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
