"""Keeps models in memory and lets them go, as inference clients may ask for."""

import asyncio

from mlx_server.models.pool.manager import ModelPoolManager, Purpose

HELD = ("ready", "restarting")
"""States of a model that a request gets at once."""


async def load(
    pool: ModelPoolManager, model_id: str, keep_alive: float | None, purpose: Purpose
) -> None:
    """Waits for as long as the load takes. Raises as `ModelPoolManager.acquire`."""
    if model_id:
        entry = await asyncio.to_thread(pool.catalog.find, model_id)
        if entry.embeds == (purpose == "embed"):
            await pool.load(entry.id)
    async with pool.acquire(model_id, keep_alive, purpose):
        pass


async def let_go(pool: ModelPoolManager, model_id: str) -> None:
    """The model ends once it is unused, unless it is pinned. Raises ModelNotFound."""
    entry = await asyncio.to_thread(pool.catalog.find, model_id)
    # Nothing is awaited from here on to where it is acquired, so it is not loaded for this.
    if any(one.id == entry.id and one.state in HELD for one in pool.statuses()):
        async with pool.acquire(entry.id, 0.0, "any"):
            pass
