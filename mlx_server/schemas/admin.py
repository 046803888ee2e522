"""The admin API's own wire formats. Times are in seconds, memory and sizes in bytes."""

from typing import Literal

from mlx_server.schemas.base import NonEmpty, RequestObject, ResponseObject


class PullRequest(RequestObject):
    """The body of `POST /admin/models/pull`."""

    model: NonEmpty


class PullEvent(ResponseObject):
    """One event of a pull; the last one of a pull that went well says `success` alone."""

    status: str
    completed: int | None = None
    total: int | None = None


class Memory(ResponseObject):
    """An engine's device memory."""

    active: int
    peak: int
    cache: int
    limit: int


class PrefixCache(ResponseObject):
    """What an engine's prefix cache holds, and the prompt tokens looked up and found."""

    blocks: int
    bytes: int
    prompt_tokens: int
    cached_tokens: int


class Download(ResponseObject):
    """How far the pull of a model is."""

    status: str
    completed: int
    total: int


class AdminModel(ResponseObject):
    """A model as its operator sees it."""

    id: str
    state: Literal["absent", "downloading", "loading", "ready", "restarting", "draining", "failed"]
    reason: str | None
    pid: int | None
    device: str | None
    context_length: int | None
    memory: Memory | None
    need: int | None
    load_seconds: float | None
    loads: int
    restarts: int
    last_lines: list[str]
    in_flight: int
    running: int
    waiting: int
    preempted: int
    step_seconds: float
    kv_bytes: int
    prefix_cache: PrefixCache | None
    waiting_to_load: int
    pinned: bool
    last_used: float | None
    expires: float | None
    aliases: list[str]
    source: str | None
    path: str | None
    size: int | None
    model_type: str | None
    download: Download | None


class AdminModelList(ResponseObject):
    """The answer of `GET /admin/models`."""

    models: list[AdminModel]


class Removed(ResponseObject):
    """The answer of `DELETE /admin/models/{model_id}`."""

    id: str
    deleted: Literal[True]


class Lag(ResponseObject):
    """How late the event loop was, in seconds."""

    p50: float
    p99: float
    max: float


class AdminStats(ResponseObject):
    """The answer of `GET /admin/stats`."""

    event_loop_lag_seconds: Lag
