"""A server with three tiny models and a memory budget, for tests of the pool."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_server.models.pool.footprint import read_footprint
from tests.support.server import Server, chat, serving
from tests.support.tiny import build_tiny_model

KV = 2 * 1024 * 1024
BATCH = 8
NAMES = ("a", "b", "c")
SWAP_INTERVAL = 0.3
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
