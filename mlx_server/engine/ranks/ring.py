"""What MLX connects ranks by: a ring of TCP connections between neighbours, or RDMA (JACCL).

Neither is encrypted, nor does it ask who connects. MLX stops listening once all have joined.
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

from mlx_server.engine.protocol import Rdma
from mlx_server.engine.ranks.messages import Addresses

LOOPBACK = "127.0.0.1"
JOIN_SECONDS = 20.0
"""For all ranks to join, after which this process ends: MLX waits for ever, and holds Python's lock
meanwhile, so that nothing else would notice that a rank is gone."""


class RingError(Exception):
    """The ranks cannot be connected."""


class NoRdma(RingError):
    """MLX has no RDMA here."""


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
    rdma: Rdma | None = None,
    announce: Callable[[], None] = lambda: None,
) -> mx.distributed.Group:
    """Connect to the others, all of whom do the same now. Raises RingError.

    `announce` is called at the last moment: the last rank connects to rank 0 first, and if nobody
    listens there yet it tries again a second later.
    """
    if rdma is not None and not mx.distributed.is_available("jaccl"):
        raise NoRdma("the hosts file asks for RDMA (jaccl), which MLX does not have there")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "hosts.json")
        os.environ["MLX_RANK"] = str(rank)
        if rdma is None:
            file.write_text(json.dumps(ranks))
            os.environ["MLX_HOSTFILE"] = str(file)
        else:
            file.write_text(json.dumps(rdma.devices))
            os.environ |= {"MLX_IBV_DEVICES": str(file), "MLX_JACCL_COORDINATOR": ranks[0][0]}
            if rdma.around:
                os.environ["MLX_JACCL_RING"] = "1"
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
        announce()
        try:
            return mx.distributed.init(strict=True, backend="jaccl" if rdma else "ring")
        except RuntimeError as error:
            where = "use RDMA" if rdma else f"listen on {', '.join(ranks[rank])}"
            raise RingError(f"rank {rank} cannot {where}: {error}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
