"""A rank beside rank 0: `python -m mlx_server.engine.follower FD`, FD an open socket to rank 0.

It holds its part of the model's weights and caches, and carries out the Plans that rank 0 writes.
It knows no requests but those in Plans, and draws no tokens.
"""

import faulthandler
import logging
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_server.engine.idle import RELEASE_SECONDS, Chore, IdleTime
from mlx_server.engine.loading import array_sizes_of, is_models_fault, prepare
from mlx_server.engine.plan import Outcome, Plan
from mlx_server.engine.ranks.leader import LeaderConnection
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
        self._idle = IdleTime([Chore(RELEASE_SECONDS, memory.release_all)])
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
    options = begin.load.options
    memory, _ = prepare(options)
    from mlx_server.engine.cache.prefix import PrefixCache
    from mlx_server.engine.ranks import ring
    from mlx_server.engine.ranks.sharing import Following
    from mlx_server.engine.run.backend import Backend
    from mlx_server.engine.run.runner import FollowingRunner

    leader.tell(Prepared())
    join = leader.command()
    assert isinstance(join, Join)
    ranks = Following(ring.join(begin.rank, join.addresses), leader)
    backend = Backend(Path(begin.load.path), options, memory, ranks=ranks)
    leader.tell(Loaded(memory.limit - backend.weights_bytes))
    settled = leader.command()
    assert isinstance(settled, Settled)
    memory.wiring.hold(array_sizes_of(backend.model))
    prefix = PrefixCache(backend.layout, settled.prefix_limit)
    runner = FollowingRunner(backend, prefix, settled.longest_sequence)
    return Rank(leader, runner, memory)


def main() -> None:
    """Entry of the process, which is in rank 0's group."""
    faulthandler.register(signal.SIGUSR1)
    leader = LeaderConnection(socket.socket(fileno=int(sys.argv[1])))
    begin = leader.command()
    if not isinstance(begin, Begin):
        raise SystemExit(f"expected to be told to begin, got {type(begin).__name__}")
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
