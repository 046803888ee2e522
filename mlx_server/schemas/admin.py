"""The admin API's wire formats. Times are in seconds, sizes in bytes."""

from typing import Literal

from mlx_server.schemas.objects import NonEmpty, RequestObject, ResponseObject


class PullRequest(RequestObject):
    model: NonEmpty


class LoadRequest(RequestObject):
    """`draft_model` is the id of a small model that guesses tokens, empty for none; it counts until
    the server ends. What is left out is as in the settings.
    """

    draft_model: str | None = None


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


class Rank(ResponseObject):
    """One of the processes among which an engine divides the model."""

    rank: int
    pid: int
    memory: Memory | None
    host: str


class Replica(ResponseObject):
    """One of the model's engines."""

    state: Literal["ready", "restarting", "failed"]
    pid: int | None
    in_flight: int
    restarts: int
    ranks: list[Rank]
    host: str
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
    failures: int
    restarts: int
    last_lines: list[str]
    in_flight: int
    running: int
    waiting: int
    preempted: int
    guessed: int
    accepted: int
    step_seconds: float
    kv_bytes: int
    kv_limit: int | None
    prefix_cache: PrefixCache | None
    batching: Batching | None
    replicas: list[Replica]
    waiting_to_load: int
    pinned: bool
    draft_model: str | None
    own_head: bool
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


class AdminRequest(ResponseObject):
    """`at` is since the epoch. `status` is 0 while it runs, and where the client left first.
    `protocol` is `openai`, say; `client` a key's name or an address. Of several prompts, tokens are
    added up, and times are the longest. `finish` has an entry per completion.
    """

    id: str
    at: float
    protocol: str
    path: str
    client: str
    status: int
    seconds: float | None
    operation: Literal["chat", "text_completion", "embeddings"] | None
    model: str | None
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    load_seconds: float | None
    render_seconds: float | None
    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    first_token_seconds: float | None
    finish: list[Literal["stop", "length", "tool_calls", "abort", "error"]]
    engine_ends: int
    error: str | None


class AdminRequests(ResponseObject):
    """Newest first."""

    running: list[AdminRequest]
    ended: list[AdminRequest]


class AdminQuantiles(ResponseObject):
    """In seconds; null without observations."""

    p50: float | None
    p95: float | None


class AdminModelSample(ResponseObject):
    running: int
    waiting: int
    kv_bytes: int
    prefix_cache_bytes: int
    memory_bytes: int
    restarts: int


class AdminSample(ResponseObject):
    """`at` is since the epoch, rates are per second. `models` has those that are loaded."""

    at: float
    prompt_tokens_rate: float
    cached_tokens_rate: float
    generation_tokens_rate: float
    requests_rate: float
    errors_rate: float
    time_to_first_token: AdminQuantiles
    inter_token_latency: AdminQuantiles
    event_loop_lag_p99: float
    models: dict[str, AdminModelSample]


class AdminHistory(ResponseObject):
    """Oldest first; `interval` is in seconds."""

    interval: float
    samples: list[AdminSample]


class AdminReloaded(ResponseObject):
    """Names of settings: those that changed, and those whose change waits for a restart."""

    changed: list[str]
    need_restart: list[str]
