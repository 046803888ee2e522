"""Pools of three tiny models within a memory budget: a server's, and one in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_server.config import Settings
from mlx_server.engine.protocol import Device, Generate, Sampling
from mlx_server.models.pool.footprint import read_footprint
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.pool.status import ModelStatus
from mlx_server.models.store.catalog import Catalog
from tests.support.engines import Fleet, NoTexts, ScriptedEngine
from tests.support.server import Server, chat, serving
from tests.support.tiny import build_tiny_model

KV = 2 * 1024 * 1024
BATCH = 8
NAMES = ("a", "b", "c")
SWAP_INTERVAL = 0.3
CPU = Device("cpu", 1 << 40, 1 << 40)
LIVELY = 30.0
"""Seconds within which anything at all must have ended, loads on a busy machine included."""


def three_models(folder: Path) -> Path:
    """Write three models of one size to `folder` and return it."""
    for seed, name in enumerate(NAMES):
        build_tiny_model(folder / name, seed=seed)
    return folder


def need_of(model: Path) -> int:
    """Bytes that the model in a folder is promised under the settings here."""
    footprint = read_footprint(model, True)
    return footprint.weights + KV + footprint.working(BATCH)


@contextmanager
def pool(folder: Path, models: Path, budget: float, *flags: str, **more: Any) -> Iterator[Server]:
    """A server that finds `models` and may use `budget` bytes for those it loads."""
    settings = {
        "model_dirs": [str(models)],
        "memory_limit": str(int(budget)),
        "kv_cache": str(KV),
        "max_batch": BATCH,
        "swap_interval": SWAP_INTERVAL,
        "dequantize": "always",
    }
    with serving(folder, *flags, **settings | more) as server:
        yield server


def short(model: str, **more: Any) -> dict[str, Any]:
    return chat(model, max_tokens=4, ignore_eos=True) | more


def long(model: str, tokens: int = 1500, **more: Any) -> dict[str, Any]:
    return chat(model, max_tokens=tokens, ignore_eos=True, stream=True) | more


# in this process, with scripted engines


@dataclass
class Pool:
    """A pool whose engines compute nothing, and how to ask it things."""

    manager: ModelPoolManager
    fleet: Fleet
    texts: NoTexts
    budget: int

    def status(self, name: str) -> ModelStatus:
        known = {status.id: status for status in self.manager.statuses()}
        return known.get(name, ModelStatus(name, "absent"))

    def engine(self, name: str) -> ScriptedEngine:
        """The engine that works for a model now."""
        return self.fleet.of(self.status(name).pid)

    @property
    def loaded(self) -> set[str]:
        return {status.id for status in self.manager.statuses() if status.pid}

    @property
    def loads(self) -> int:
        return sum(status.loads for status in self.manager.statuses())

    @property
    def reserved(self) -> int:
        """Bytes promised to models that take any."""
        statuses = self.manager.statuses()
        return sum(s.need or 0 for s in statuses if s.state not in ("absent", "failed"))

    async def ask(self, name: str, tokens: int = 3, keep_alive: float | None = None) -> list[int]:
        """Generate so many tokens; returns them."""
        async with self.manager.acquire(name, keep_alive) as model:
            request = Generate(0, [0, 1, 2], Sampling(), tokens)
            with model.engine.generate([request], f"asked of {name}") as stream:
                return [token async for _, row in stream.rows() for token in row.tokens]

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[None]:
        """Use a model while the block runs."""
        async with self.manager.acquire(name):
            yield

    async def reaches(self, check: Callable[[], object]) -> None:
        await settled(check)


async def settled(check: Callable[[], object]) -> None:
    """Wait until `check` holds."""
    async with asyncio.timeout(LIVELY):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def local_pool(
    folder: Path,
    models: Path,
    budget: float,
    *preloaded: str,
    device: Device = CPU,
    **more: Any,
) -> AsyncIterator[Pool]:
    """A pool with scripted engines that may use `budget` bytes; it leaves nothing behind."""
    values: dict[str, Any] = {
        "home": folder / "home",
        "model_dirs": [models],
        "memory_limit": str(int(budget)),
        "kv_cache": str(KV),
        "max_batch": BATCH,
        "swap_interval": 0.0,
        "dequantize": "always",
    }
    settings = Settings(**values | more)
    fleet = Fleet(weights_bytes=read_footprint(models / "a", True).weights)
    texts = NoTexts()

    async def find_device() -> Device:
        return device

    manager = ModelPoolManager(
        settings,
        Catalog(settings),
        texts=texts,
        start_engine=fleet.start,
        find_device=find_device,
    )
    await manager.start(list(preloaded))
    try:
        yield Pool(manager, fleet, texts, int(budget))
    finally:
        await manager.stop()
    assert (fleet.running, texts.open_texts) == ([], 0), "something was left behind"
