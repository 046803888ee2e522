"""What MLX connects ranks by: a ring of TCP connections between neighbours, RDMA (JACCL), or NCCL.

None is encrypted, nor does it ask who connects. MLX stops listening once all have joined.
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

from mlx_server.engine.protocol import Fabric, Rdma
from mlx_server.engine.ranks.messages import Addresses

LOOPBACK = "127.0.0.1"
NAMES = {"jaccl": "RDMA (jaccl)", "nccl": "NCCL"}
JOIN_SECONDS = 20.0
"""For all ranks to join, after which this process ends: MLX waits for ever, and holds Python's lock
meanwhile, so that nothing else would notice that a rank is gone."""


class RingError(Exception):
    """The ranks cannot be connected."""


class NoFabric(RingError):
    """MLX cannot talk so here."""


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
    rank: int,
    ranks: list[Addresses],
    fabric: Fabric | None = None,
    announce: Callable[[], None] = lambda: None,
) -> mx.distributed.Group:
    """Connect to the others, all of whom do the same now. Raises RingError.

    `announce` is called at the last moment: the last rank connects to rank 0 first, and if nobody
    listens there yet it tries again a second later.
    """
    backend = "ring" if fabric is None else "jaccl" if isinstance(fabric, Rdma) else "nccl"
    if fabric is not None and not mx.distributed.is_available(backend):
        name = NAMES[backend]
        raise NoFabric(f"its ranks are to talk over {name}, which MLX does not have there")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= _told(rank, ranks, fabric, Path(folder, "hosts.json"))
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
        announce()
        try:
            return mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            where = f"use {NAMES[backend]}" if fabric else f"listen on {', '.join(ranks[rank])}"
            raise RingError(f"rank {rank} cannot {where}: {error}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()


def _told(rank: int, ranks: list[Addresses], fabric: Fabric | None, file: Path) -> dict[str, str]:
    """Variables that MLX reads, which may name `file`."""
    own = {"MLX_RANK": str(rank)}
    if fabric is None:
        file.write_text(json.dumps(ranks))
        return own | {"MLX_HOSTFILE": str(file)}
    first = ranks[0][0]
    if isinstance(fabric, Rdma):
        file.write_text(json.dumps(fabric.devices))
        own |= {"MLX_IBV_DEVICES": str(file), "MLX_JACCL_COORDINATOR": first}
        return own | ({"MLX_JACCL_RING": "1"} if fabric.around else {})
    host, _, port = first.rpartition(":")
    return own | {"MLX_WORLD_SIZE": str(len(ranks)), "NCCL_HOST_IP": host, "NCCL_PORT": port}
