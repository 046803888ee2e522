"""Liveness and readiness."""

from fastapi import APIRouter

from mlx_server.api.http.dependencies import PoolDep
from mlx_server.api.openai.wire import documented
from mlx_server.errors import Unavailable

router = APIRouter()


@router.get("/health", responses=documented(400, 413))
async def health() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


@router.get("/ready", responses=documented(400, 413, 503))
async def ready(pool: PoolDep) -> dict[str, str]:
    """Whether every model named at the start can generate."""
    if (reason := pool.not_ready_reason) is not None:
        raise Unavailable(reason, code="not_ready", retry_after=1)
    return {"status": "ready"}
