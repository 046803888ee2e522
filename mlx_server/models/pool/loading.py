"""Loads a model's engine and text side together."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from mlx_server.engine.client import Elsewhere, EngineClient
from mlx_server.engine.protocol import Embedding, Load, LoadOptions, Ready
from mlx_server.errors import ModelLoadFailed, ServerError, reason
from mlx_server.events import event
from mlx_server.models.hosts import distant
from mlx_server.models.hosts.elsewhere import RanksElsewhere
from mlx_server.models.hosts.machines import Machines
from mlx_server.models.hosts.part import HostAway, HostRefuses
from mlx_server.models.pool.needs import LoadPlan
from mlx_server.models.pool.replica import Replica
from mlx_server.models.pool.resumable import ResumableEngine
from mlx_server.models.pool.supervisor import EngineSupervisor
from mlx_server.models.pool.supervisors import Supervisors
from mlx_server.models.store.generation import own_sampling
from mlx_server.models.store.locks import ModelLock
from mlx_server.models.text.client import ModelText, TextProcess
from mlx_server.telemetry.tracing import load_span

StartEngine = Callable[
    [str, Path, LoadOptions, Path | None, Embedding | None, Elsewhere | None],
    Awaitable[EngineClient],
]

log = logging.getLogger("mlx_server.pool")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    id: str
    engine: ResumableEngine
    supervisor: Supervisors
    text: ModelText
    facts: Ready
    sampling: Mapping[str, float]
    """Recommended where a request says nothing, by `Sampling`'s names."""
    locks: tuple[ModelLock, ...]
    scores: bool = False
    """Whether it judges pairs of texts."""

    def close(self) -> None:
        for lock in self.locks:
            lock.release()
        self.text.close()


@dataclass(frozen=True, slots=True)
class ModelLoader:
    home: Path
    load_timeout: float
    hang_timeout: float
    texts: TextProcess
    start_engine: StartEngine
    model_sampling: bool
    machines: Machines

    async def load(self, plan: LoadPlan) -> LoadedModel:
        """Leaves nothing behind on failure or cancellation."""
        model_id = plan.entry.id
        sampling = await asyncio.to_thread(own_sampling, plan.path) if self.model_sampling else {}
        with load_span(model_id) as span:
            locks = tuple(self._locks(plan))
            try:
                async with asyncio.timeout(self.load_timeout):
                    processes, text = await self._start_both(plan)
            except BaseException:
                for lock in locks:
                    lock.release()
                raise
            for process in processes:
                _prepare(process, text, plan)
            facts = processes[0].ready
            assert facts is not None
            span.loaded(device=facts.device, weights_bytes=facts.weights_bytes)
        engine = ResumableEngine(model_id, plan.replicas)
        supervisor = Supervisors(engine, self._supervisors(plan, text, processes, engine))
        scores = plan.embedding is not None and plan.embedding.scores
        return LoadedModel(model_id, engine, supervisor, text, facts, sampling, locks, scores)

    def failure(self, error: Exception, model_id: str) -> ServerError:
        match error:
            case ServerError():
                return error
            case TimeoutError():
                return ModelLoadFailed(f"it did not load within {self.load_timeout:g} seconds")
            case OSError():
                return ModelLoadFailed(f"its engine could not be started: {reason(error)}")
        log.error(event("model_load_crashed", model=model_id), exc_info=error)
        return ModelLoadFailed(f"{type(error).__name__}: {error}")

    def _supervisors(
        self,
        plan: LoadPlan,
        text: ModelText,
        processes: list[EngineClient],
        engine: ResumableEngine,
    ) -> list[EngineSupervisor]:
        """Of engines here, and of those that come once their machines are there."""
        start = partial(self._start_prepared, plan, text)
        here = [
            EngineSupervisor(process, replica, start, self.hang_timeout)
            for process, replica in zip(processes, engine.replicas, strict=False)
        ]
        homes = plan.hosts[: plan.replicas - len(here)]
        spares = plan.hosts[len(homes) :]
        there = [
            EngineSupervisor(
                None,
                replica,
                partial(self._start_distant, plan, text, engine, replica, (home, *spares)),
                self.hang_timeout,
                host=home,
            )
            for home, replica in zip(homes, engine.replicas[len(here) :], strict=True)
        ]
        return [*here, *there]

    def _locks(self, plan: LoadPlan) -> list[ModelLock]:
        """Of the model's folder and its draft's. Raises ModelLoadFailed."""
        locks = [ModelLock(self.home, plan.path)]
        if plan.draft is not None and plan.draft.path is not None:
            try:
                locks.append(ModelLock(self.home, plan.draft.path))
            except ModelLoadFailed:
                locks[0].release()
                raise
        return locks

    async def _start_both(self, plan: LoadPlan) -> tuple[list[EngineClient], ModelText]:
        trusted = plan.options.trust_remote_code
        starting = asyncio.create_task(self._start_engines(plan))
        opening = asyncio.create_task(self.texts.open(plan.path, plan.entry.id, trusted))
        try:
            return await asyncio.gather(starting, opening)
        except BaseException:
            starting.cancel()
            opening.cancel()
            processes, text = await asyncio.gather(starting, opening, return_exceptions=True)
            if not isinstance(text, BaseException):
                text.close()
            if not isinstance(processes, BaseException):
                await _stop_all(processes)
            raise

    async def _start_engines(self, plan: LoadPlan) -> list[EngineClient]:
        here = 1 if plan.hosts else plan.replicas
        starts = [asyncio.create_task(self._start_engine(plan, 1.0)) for _ in range(here)]
        try:
            return await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            ended = await asyncio.gather(*starts, return_exceptions=True)
            await _stop_all(one for one in ended if not isinstance(one, BaseException))
            raise

    async def _start_prepared(
        self, plan: LoadPlan, text: ModelText, kv_share: float
    ) -> EngineClient:
        process = await self._start_engine(plan, kv_share)
        _prepare(process, text, plan)
        return process

    async def _start_distant(
        self,
        plan: LoadPlan,
        text: ModelText,
        engine: ResumableEngine,
        replica: Replica,
        hosts: tuple[str, ...],
        kv_share: float,
    ) -> EngineClient:
        """Waits for one of `hosts` for as long as requests are served without."""
        options = self._options(plan, kv_share)
        load = Load(str(plan.path), options, _adapter(plan), plan.embedding)
        taken = None
        while taken is None:
            try:
                taken = await self._take(hosts, 1, plan, load)
            except (HostAway, HostRefuses) as error:
                if not engine.served:
                    raise
                if isinstance(error, HostRefuses):
                    replica.refused = error.message
                    log.error(event("replica_refused", model=plan.entry.id, reason=error.message))
                    await self.machines.news()
        async with asyncio.timeout(self.load_timeout):
            process = await distant.join(plan.entry.id, taken)
        log.info(event("replica_joined", model=plan.entry.id, pid=process.pid, host=process.host))
        _prepare(process, text, plan)
        return process

    async def _start_engine(self, plan: LoadPlan, kv_share: float) -> EngineClient:
        options, entry = self._options(plan, kv_share), plan.entry
        async with asyncio.timeout(self.load_timeout):
            elsewhere = None
            if plan.hosts and options.ranks > 1:
                load = Load(str(plan.path), options, _adapter(plan))
                elsewhere = await self._take(plan.hosts, options.ranks - 1, plan, load)
            return await self.start_engine(
                entry.id, plan.path, options, entry.adapter_path, plan.embedding, elsewhere
            )

    async def _take(
        self, hosts: tuple[str, ...], count: int, plan: LoadPlan, load: Load
    ) -> RanksElsewhere:
        return await self.machines.take(hosts, count, plan.entry.id, plan.need.total, load)

    def _options(self, plan: LoadPlan, kv_share: float) -> LoadOptions:
        return msgspec.structs.replace(
            plan.options,
            memory_limit=str(plan.need.arrays),
            wired_limit=plan.wired,
            kv_limit=plan.need.kv,
            kv_share=kv_share,
        )


def _adapter(plan: LoadPlan) -> str | None:
    return str(plan.entry.adapter_path) if plan.entry.adapter_path else None


async def _stop_all(processes: Iterable[EngineClient]) -> None:
    await asyncio.gather(*(process.stop() for process in processes))


def _prepare(process: EngineClient, text: ModelText, plan: LoadPlan) -> None:
    if text.tokenizer is not None and plan.embedding is None:
        process.give_tokenizer(text.tokenizer)
