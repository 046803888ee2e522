"""The admin API's wire formats. Times are in seconds, sizes in bytes."""

from typing import Literal

from mlx_server.schemas.objects import NonEmpty, RequestObject, ResponseObject


class PullRequest(RequestObject):
    model: NonEmpty


class PullEvent(ResponseObject):
    """The last event of a successful pull has `status` "success" alone."""

    status: str
    completed: int | None = None
    total: int | None = None


class Memory(ResponseObject):
    active: int
    peak: int
    cache: int
    limit: int
    wired: int


class DiskCache(ResponseObject):
    """`refused_blocks` were not written: the disk, its limit or the day's had no room."""

    blocks: int
    written_bytes: int
    read_bytes: int
    refused_blocks: int


class PrefixCache(ResponseObject):
    """`prompt_tokens` were looked up, `cached_tokens` of them found."""

    blocks: int
    bytes: int
    prompt_tokens: int
    cached_tokens: int
    disk: DiskCache | None


class Batching(ResponseObject):
    """Which requests decode in one pass, and which prompts are computed in one; `reason` says what
    is in the way of those of any length.
    """

    decode: Literal["any length", "equal length", "one at a time"]
    prefill: Literal["any length", "equal length", "one at a time"]
    reason: str | None


class Download(ResponseObject):
    status: str
    completed: int
    total: int


class AdminModel(ResponseObject):
    id: str
    state: Literal["absent", "downloading", "loading", "ready", "restarting", "draining", "failed"]
    reason: str | None
    pid: int | None
    device: str | None
    context_length: int | None
    mixed_steps: str | None
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
    batching: Batching | None
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
    """`memory_budget` is what all models together may `need`."""

    memory_budget: int
    models: list[AdminModel]


class Removed(ResponseObject):
    id: str
    deleted: Literal[True]


class Lag(ResponseObject):
    """Of the event loop, in seconds."""

    p50: float
    p99: float
    max: float


class AdminStats(ResponseObject):
    event_loop_lag_seconds: Lag
