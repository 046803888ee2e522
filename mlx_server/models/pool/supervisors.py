"""The supervisors of all engines of one model, as one."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_server.engine.protocol import DiskStats, PrefixStats, RankStats, Stats, total_memory
from mlx_server.errors import ServerError
from mlx_server.events import event
from mlx_server.models.pool.replica import Replica
from mlx_server.models.pool.resumable import ResumableEngine
from mlx_server.models.pool.supervisor import EngineSupervisor

log = logging.getLogger("mlx_server.supervisor")


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """`host`: its machine, if not this one; while there is no engine, where one is awaited.
    `reason`: why it has failed.
    """

    state: Literal["ready", "restarting", "failed"]
    pid: int | None
    in_flight: int
    restarts: int
    ranks: tuple[RankStats, ...] = ()
    """Its processes, where the model is divided among several."""
    host: str = ""
    reason: str | None = None


class Supervisors:
    """In the order of the engine's replicas."""

    def __init__(self, engine: ResumableEngine, supervisors: list[EngineSupervisor]) -> None:
        self._engine = engine
        self._supervisors = supervisors

    @property
    def restarting(self) -> bool:
        """Whether no engine is there."""
        return all(one.restarting for one in self._supervisors)

    @property
    def restarts(self) -> int:
        return sum(one.restarts for one in self._supervisors)

    @property
    def last_lines(self) -> tuple[str, ...]:
        return next((one.last_lines for one in self._supervisors if one.last_lines), ())

    @property
    def pid(self) -> int | None:
        """Of the first engine that runs on this machine."""
        here = (one.pid for one in self._supervisors if not one.host)
        return next((pid for pid in here if pid is not None), None)

    @property
    def stats(self) -> Stats | None:
        known = [stats for one in self._supervisors if (stats := one.stats) is not None]
        return added(known) if known else None

    @property
    def replicas(self) -> list[ReplicaStatus]:
        return [
            ReplicaStatus(
                state=_state(replica),
                pid=one.pid,
                in_flight=len(replica.requests),
                restarts=one.restarts,
                ranks=_ranks(one.stats),
                host=one.host,
                reason=replica.given_up or replica.refused,
            )
            for replica, one in zip(self._engine.replicas, self._supervisors, strict=True)
        ]

    async def run(self, wanted: Callable[[], bool]) -> None:
        """Replace engines that end: the only one while `wanted`, one of several in any case.

        One of several that cannot be loaded any more is given up. Raises as loads do when that was
        the last.
        """
        kept = wanted if len(self._supervisors) == 1 else _always
        tasks = {
            asyncio.create_task(one.run(kept)): replica
            for replica, one in zip(self._engine.replicas, self._supervisors, strict=True)
        }
        running = set(tasks)
        try:
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not running or task.exception() is None:
                        task.result()
                    else:
                        self._give_up(tasks[task], task.exception())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def stop(self) -> None:
        await asyncio.gather(*(one.stop() for one in self._supervisors))

    def _give_up(self, replica: Replica, error: BaseException | None) -> None:
        reason = error.message if isinstance(error, ServerError) else repr(error)
        log.error(event("replica_given_up", model=self._engine.model_id, reason=reason))
        self._engine.give_up(replica, reason)


def _always() -> bool:
    return True


def _state(replica: Replica) -> Literal["ready", "restarting", "failed"]:
    if replica.given_up is not None or replica.refused is not None:
        return "failed"
    return "restarting" if replica.process is None else "ready"


def _ranks(stats: Stats | None) -> tuple[RankStats, ...]:
    return tuple(stats.ranks) if stats is not None else ()


def added(stats: list[Stats]) -> Stats:
    """Of several engines together; of times the longest."""
    if len(stats) == 1:
        return stats[0]
    disks = [one.prefix.disk for one in stats if one.prefix.disk is not None]
    prefix = [one.prefix for one in stats]
    return Stats(
        running=sum(one.running for one in stats),
        prefilling=sum(one.prefilling for one in stats),
        waiting=sum(one.waiting for one in stats),
        step_seconds=max(one.step_seconds for one in stats),
        kv_bytes=sum(one.kv_bytes for one in stats),
        preempted=sum(one.preempted for one in stats),
        prefix=PrefixStats(
            blocks=sum(one.blocks for one in prefix),
            bytes=sum(one.bytes for one in prefix),
            prompt_tokens=sum(one.prompt_tokens for one in prefix),
            cached_tokens=sum(one.cached_tokens for one in prefix),
            disk=_added_disks(disks) if disks else None,
        ),
        memory=total_memory(one.memory for one in stats),
        longest_turn=max(one.longest_turn for one in stats),
        guessed=sum(one.guessed for one in stats),
        accepted=sum(one.accepted for one in stats),
    )


def _added_disks(disks: list[DiskStats]) -> DiskStats:
    """They share a folder, so that its blocks count once."""
    return DiskStats(
        blocks=max(one.blocks for one in disks),
        written_bytes=sum(one.written_bytes for one in disks),
        read_bytes=sum(one.read_bytes for one in disks),
        refused_blocks=sum(one.refused_blocks for one in disks),
    )
