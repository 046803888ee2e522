"""A rank beside rank 0: `python -m mlx_server.engine.follower FD [FD]`, the first an open socket to
rank 0.

On another machine than rank 0's the second is one to the process that has started it, which says
what to load here, and ends the rank when it ends.

It holds its part of the model's weights and caches, and carries out the Plans that rank 0 writes.
It knows no requests but those in Plans, and draws no tokens.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_server.engine.idle import RELEASE_SECONDS, Chore, IdleTime
from mlx_server.engine.loading import array_sizes_of, disk_cache, is_models_fault, prepare
from mlx_server.engine.plan import Outcome, Plan
from mlx_server.engine.protocol import FrameReader, Load, decode_to_engine
from mlx_server.engine.ranks.leader import RECEIVE_BYTES, LeaderConnection
from mlx_server.engine.ranks.messages import (
    Begin,
    Failing,
    Forget,
    Join,
    Loaded,
    Prepared,
    Rest,
    Settled,
    Sleep,
    Stop,
    Turn,
    Using,
)

if TYPE_CHECKING:
    from mlx_server.engine.memory import DeviceMemory
    from mlx_server.engine.run.runner import Runner

USING_SECONDS = 1.0
"""Between reports of the memory in use while there is work."""

log = logging.getLogger("mlx_server.engine")


class Rank:
    """Does what rank 0 says until it says to stop."""

    def __init__(self, leader: LeaderConnection, runner: "Runner", memory: "DeviceMemory") -> None:
        self._leader = leader
        self._runner = runner
        self._memory = memory
        chores = [Chore(RELEASE_SECONDS, memory.release_all), *runner.prefix.chores()]
        self._idle = IdleTime(chores)
        self._report_due = 0.0

    def run(self) -> None:
        while True:
            command = self._leader.command(self._idle.left())
            match command:
                case None:
                    self._idle.spend()
                case Turn(plan=plan):
                    self._turn(plan)
                case Rest(prefix_limit=limit):
                    self._runner.rest(limit)
                    self._report()
                case Forget():
                    self._runner.forget_prefixes()
                case Sleep():
                    self._memory.wiring.rest()
                case Stop():
                    self._runner.prefix.close()
                    self._memory.wiring.close()
                    return

    def _turn(self, plan: Plan) -> None:
        self._memory.wiring.wake()
        for _ in self._runner.run(plan, Outcome()):
            continue
        self._memory.release_excess()
        self._idle.begin()
        if time.monotonic() >= self._report_due:
            self._report()

    def _report(self) -> None:
        self._report_due = time.monotonic() + USING_SECONDS
        self._leader.tell(Using(self._memory.read()))


def load(leader: LeaderConnection, begin: Begin) -> Rank:
    """Raises ModelError, RingError."""
    options, hosts = begin.load.options, begin.load.hosts
    memory, _ = prepare(begin.load)
    from mlx_server.engine.cache.blocks import Charge
    from mlx_server.engine.cache.prefix import PrefixCache
    from mlx_server.engine.ranks import ring
    from mlx_server.engine.ranks.sharing import Following
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.run.runner import FollowingRunner

    own = ring.free_addresses(hosts[begin.rank].addresses) if hosts else []
    leader.tell(Prepared(os.getpid(), own))
    join = leader.command()
    assert isinstance(join, Join)
    ranks = Following(ring.join(begin.rank, join.ranks, join.fabric), leader)
    adapter = Path(begin.load.adapter_path) if begin.load.adapter_path else None
    backend = Backend(Path(begin.load.path), options, memory, adapter, ranks)
    leader.tell(Loaded(memory.limit - backend.weights_bytes, backend.kv_cost.own))
    settled = leader.command()
    assert isinstance(settled, Settled)
    memory.wiring.hold(array_sizes_of(backend.model))
    charge = Charge(settled.block_bytes, settled.snapshot_bytes) if backend.layered else None
    disk = disk_cache(begin.load, backend) if settled.prefix_limit > 0 else None
    prefix = PrefixCache(backend.layout, settled.prefix_limit, disk, charge)
    runner = FollowingRunner(backend, prefix, settled.longest_sequence)
    return Rank(leader, runner, memory)


def load_here(starter: socket.socket) -> Load:
    """What the process that has started this one wants loaded. From then on a thread ends this
    process when that one ends.
    """
    frames = FrameReader()
    while data := starter.recv(RECEIVE_BYTES):
        for body in frames.feed(data):
            threading.Thread(target=_end_with, args=(starter,), name="starter", daemon=True).start()
            message = decode_to_engine(body)
            assert isinstance(message, Load)
            return message
    raise SystemExit("nothing to load")


def _end_with(starter: socket.socket) -> None:
    while starter.recv(RECEIVE_BYTES):
        continue
    os._exit(0)


def main() -> None:
    """Entry of the process, which is in rank 0's group, or in one of its own."""
    faulthandler.register(signal.SIGUSR1)
    here = load_here(socket.socket(fileno=int(sys.argv[2]))) if len(sys.argv) > 2 else None
    leader = LeaderConnection(socket.socket(fileno=int(sys.argv[1])))
    begin = leader.command()
    if not isinstance(begin, Begin):
        raise SystemExit(f"expected to be told to begin, got {type(begin).__name__}")
    if here is not None:
        begin = Begin(begin.rank, here)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(levelname)s rank={begin.rank} %(message)s",
        stream=sys.stderr,
    )
    try:
        rank = load(leader, begin)
    except Exception as error:
        log.exception("event=load_failed path=%s", begin.load.path)
        if is_models_fault(error):
            leader.tell(Failing(str(error)))
        raise SystemExit(1) from error
    rank.run()


if __name__ == "__main__":
    main()
