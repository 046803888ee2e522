"""Every setting of the server. Flags win over `MLX_SERVER_*`, which win over the TOML file."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mlx_server.dimensions import Division
from mlx_server.engine.protocol import LoadOptions
from mlx_server.events import Area, Level, LogFormat
from mlx_server.units import (
    DURATION,
    SIZE,
    SIZE_OR_OFF,
    SIZE_OR_SHARE,
    WIRED,
    parse_bytes,
    parse_seconds,
)


def _as_number(value: object) -> object:
    """Environment variables are text, which a Literal of numbers refuses."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _bytes_or_off(text: str) -> int | None:
    return None if text.strip() == "off" else parse_bytes(text, 0)


def _named(path: object) -> object:
    """An empty path would be the working directory."""
    if path == "":
        raise ValueError("a path must not be empty")
    return path


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path} is below the home of nobody here") from None


def default_file() -> Path:
    """The settings of this user, which need not exist."""
    home = os.environ.get("MLX_SERVER_HOME") or "~/.mlx-server"
    return Path(os.path.expanduser(home)) / "config.toml"


def present_default_file() -> Path | None:
    # os.path.isfile is False, where Path.is_file raises, in a closed folder.
    return default_file() if os.path.isfile(default_file()) else None


UserPath = Annotated[Path, BeforeValidator(_named), AfterValidator(_expanded)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="MLX_SERVER_",
        extra="forbid",
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    ollama_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="A second port to listen on, for programs that look for Ollama there: 11434; 0 "
        "takes a free one.",
    )
    models: list[str] = Field(
        default_factory=list, description="Models to load at start: ids, aliases or paths."
    )
    home: UserPath = Field(
        Path("~/.mlx-server"), description="Where pulled and converted models are kept."
    )
    model_dirs: list[UserPath] = Field(
        default_factory=list, description="Further folders whose sub-folders are MLX models."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        description="Other names for models: alias to id. `*` in an alias is any text, such as "
        "`claude-*`, and the longest one counts; `default` is also for requests without a model.",
    )
    adapters: dict[str, UserPath] = Field(
        default_factory=dict,
        description="LoRA adapters: `base@name` to a folder. Those in `home`/adapters/BASE/NAME "
        "are found by themselves.",
    )
    api_keys: list[SecretStr] = Field(
        default_factory=list, description="Keys that callers must show; none means open."
    )
    admin_keys: list[SecretStr] = Field(
        default_factory=list,
        description="Keys for `/admin` and everything else; if none, `api_keys` permit `/admin`.",
    )
    keys_file: UserPath | None = Field(
        None,
        description="A TOML file of more keys: `[[keys]]` with `name`, `key` or `sha256` (of the "
        "key), and `scopes` of `inference` (if unset) and `admin`, which permits everything.",
    )
    allow_no_key: bool = Field(
        False, description="Permit listening beyond loopback without an API key."
    )
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="Further host names by which clients may call the server, besides addresses, "
        "local names and this machine's; beyond loopback any name will do with an inference key.",
    )
    cors_origins: list[str] = Field(
        default_factory=list, description="Web origins whose pages may call this server."
    )
    max_body_bytes: int = Field(
        8 * 1024 * 1024, ge=1024, description="Largest request body, in bytes."
    )
    max_header_bytes: int = Field(
        64 * 1024, ge=1024, description="Largest request line and headers together, in bytes."
    )
    max_connections: int = Field(
        1024, ge=1, description="Open connections; requests on further ones get a 503."
    )
    receive_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds in which a request's headers must have come, and which its body may "
        "pause; then a 408. A body that takes longer must come at 1 KiB per second.",
    )
    send_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds after which a client that reads nothing of its answer is cut off.",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Inference requests of one caller per minute; any number if unset."
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="Tokens of prompts and completions of one caller per minute, counted when a "
        "request has ended; any number if unset.",
    )
    max_choices: int = Field(16, ge=1, description="Largest `n` of a request.")
    max_batch: int = Field(32, ge=1, le=512, description="Requests decoded together per model.")
    prefill_chunk: int | None = Field(
        None, ge=1, description="Prompt tokens computed per turn; chosen by device if unset."
    )
    speculation: Literal["auto", "off"] = Field(
        "auto",
        description="`auto`: guess tokens that came before in prompt or answer, and verify several "
        "in one step where that pays.",
    )
    draft_model: str | None = Field(
        None,
        description="A small model of the same vocabulary, by id, alias or path, that guesses the "
        "tokens of every model that generates: see `docs/speculation.md`.",
    )
    draft_model_by_model: dict[str, str] = Field(
        default_factory=dict,
        description="`draft_model` of single models: id to id, or to an empty text for none.",
    )
    context_length: int | None = Field(
        None, ge=16, description="Caps every model's context, in tokens."
    )
    model_sampling: bool = Field(
        True,
        description="Where a request leaves `temperature`, `top_p`, `top_k`, `min_p` or "
        "`repetition_penalty` out, take what the model's generation_config.json recommends.",
    )
    memory_limit: str = Field(
        "80%",
        pattern=SIZE_OR_SHARE,
        description="Memory for all models: a share of the device's, or bytes such as `12GB`; no "
        "more than Metal recommends, a CUDA device has free, or a container may take.",
    )
    cache_limit: str | None = Field(
        None,
        pattern=SIZE,
        description="Freed buffers kept for reuse; an eighth of the memory limit if unset.",
    )
    wired_memory: str = Field(
        "auto",
        pattern=WIRED,
        description="Weights that macOS may not page out, on a Mac: `auto` for those of all "
        "models, `off` for none, or the most bytes for all together, such as `24GB`; a model that "
        "does not fit what is left of them is not wired.",
    )
    dequantize: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Dequantize weights to float32 at load; `auto` does on a CPU device where they "
        "fit, and keeps the quantized ones for few rows.",
    )
    openblas: str = Field(
        "auto", description="The OpenBLAS that a Linux CPU uses: `auto`, `off` or a path."
    )
    kv_cache: str | None = Field(
        None,
        pattern=SIZE_OR_SHARE,
        description="Memory for each model's KV caches, within the memory limit: a share of it or "
        "bytes; a quarter if unset, or less where that holds `max_batch` full contexts.",
    )
    kv_bits: Annotated[Literal[4, 8] | None, BeforeValidator(_as_number)] = Field(
        None,
        description="Bits of quantized KV caches: 8 or 4; unquantized if unset. Two to four times "
        "the tokens fit, at some loss of precision; layers with a sliding window or a recurrent "
        "state stay as they are. A model whose attention cannot use it fails to load.",
    )
    gguf_bits: Annotated[Literal[4, 5, 6, 8] | None, BeforeValidator(_as_number)] = Field(
        None,
        description="Bits to which GGUF files are converted; if unset, what comes closest to the "
        "file's own.",
    )
    prefix_cache: str = Field(
        "100%",
        pattern=SIZE_OR_SHARE,
        description="How much of a model's KV memory may cache prefixes for requests that begin "
        "alike: a share or bytes; `0` caches nothing. Running requests come first.",
    )
    stable_prompts: bool = Field(
        True,
        description="Leave out of conversations, or move behind what stays, what programs change "
        "in the head of every request: see `docs/caching.md`.",
    )
    disk_cache: str = Field(
        "8GB",
        pattern=SIZE_OR_OFF,
        description="Disk space in `home`/cache for cached prefixes, which outlive restarts; `off` "
        "keeps nothing there.",
    )
    disk_cache_daily: str = Field(
        "64GB",
        pattern=SIZE_OR_OFF,
        description="What may be written there in a day, by all servers together, to spare the "
        "disk; `off` for no limit.",
    )
    responses_limit: str = Field(
        "1GB",
        pattern=SIZE,
        description="Disk space in `home`/responses for stored responses and conversations; the "
        "longest unused go first.",
    )
    responses_age: str = Field(
        "30d",
        pattern=DURATION,
        description="How long a stored response or conversation is kept unused; `-1` for good.",
    )
    max_queue: int = Field(
        256, ge=0, description="Requests that may wait for a place in a model's batch."
    )
    pinned: list[str] = Field(
        default_factory=list, description="Models that are never unloaded to make room for others."
    )
    keep_alive: str = Field(
        "30m",
        pattern=DURATION,
        description="How long an unused model stays loaded, such as `90s`, `5m`, `1h`; `-1` for "
        "good. Models loaded at start stay unless room is needed.",
    )
    keep_alive_by_model: dict[str, Annotated[str, Field(pattern=DURATION)]] = Field(
        default_factory=dict, description="`keep_alive` of single models: id to duration."
    )
    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="Engines that serve each model, independent of each other: see "
        "`docs/distributed.md`. Each takes the model's memory. With `workers`, each is on a "
        "machine of its own, the first on this one.",
    )
    replicas_by_model: dict[str, Annotated[int, Field(ge=1, le=64)]] = Field(
        default_factory=dict, description="`replicas` of single models: id to number."
    )
    ranks: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes among which each engine divides its model: see "
        "`docs/distributed.md`. Embedding models are never divided. With `workers`, each is on a "
        "machine of its own, and 1 takes all machines.",
    )
    ranks_by_model: dict[str, Annotated[int, Field(ge=1, le=64)]] = Field(
        default_factory=dict, description="`ranks` of single models: id to number."
    )
    division: Division = Field(
        "auto",
        description="What each rank gets of a model: `tensor`, a part of every layer; `pipeline`, "
        "whole layers; `auto`, the former where the model can be divided so, else the latter.",
    )
    division_by_model: dict[str, Division] = Field(
        default_factory=dict, description="`division` of single models: id to `tensor`, say."
    )
    ranks_over: Literal["ring", "nccl"] = Field(
        "ring",
        description="What ranks talk over: `ring`, TCP connections; `nccl`, between NVIDIA GPUs, "
        "of which each rank takes one. `jaccl` in `hosts_file` goes first.",
    )
    workers: list[str] = Field(
        default_factory=list,
        description="Other machines that each take one rank of every model, or one of its "
        "`replicas`, this one taking the first: names under which a `mlx-server worker` joins. "
        "Those beyond `ranks` or `replicas` are spares. See `docs/distributed.md`.",
    )
    workers_by_model: dict[str, list[str]] = Field(
        default_factory=dict,
        description="`workers` of single models: id to names, none for a model of this machine.",
    )
    worker_host: str | None = Field(
        None,
        description="IPv4 address at which workers join; if unset, this machine's first one in "
        "`hosts_file`, or else all.",
    )
    worker_port: int = Field(
        32322, ge=0, le=65535, description="Port at which workers may join; 0 takes a free one."
    )
    worker_secret: SecretStr | None = Field(
        None,
        description="What a server and its workers must both know: at least 16 characters, better "
        "given by MLX_SERVER_WORKER_SECRET than in a settings file.",
    )
    worker_secret_file: UserPath | None = Field(
        None, description="A file that holds it, where `worker_secret` is unset."
    )
    hosts_file: UserPath | None = Field(
        None,
        description="MLX's file of hosts: `workers` are all but the first, and are started over "
        "ssh. The first is this machine.",
    )
    hosts_python: str | None = Field(
        None, description="Their Python; the path of this machine's if unset."
    )
    hosts_folder: str | None = Field(
        None, description="Their working directory; this machine's, where there is one, if unset."
    )
    host_wait: float = Field(
        60.0,
        gt=0,
        description="Seconds that loading a model, or starting its engine again, waits for a "
        "machine that is away, where no spare is there; then the model fails.",
    )
    swap_interval: float = Field(
        2.0,
        ge=0,
        description="Seconds a model in use stays loaded before it makes room for one that waits.",
    )
    max_load_waiters: int = Field(
        512, ge=1, description="Requests that may wait for one model to load."
    )
    prompt_timeout: float = Field(
        60.0, gt=0, description="Seconds rendering and tokenizing one prompt may take."
    )
    load_wait: float = Field(
        30.0, gt=0, description="Seconds a request waits for its model to load before a 503."
    )
    load_timeout: float = Field(600.0, gt=0, description="Seconds after which a load is given up.")
    hang_timeout: float = Field(
        120.0,
        gt=0,
        description="Seconds an engine that has work may be silent before it is replaced; longer "
        "where its turns are long.",
    )
    queue_timeout: float = Field(
        600.0, gt=0, description="Seconds a request may wait in the queue before a 503."
    )
    request_timeout: float = Field(
        3600.0, gt=0, description="Seconds a request may take altogether before a 504."
    )
    ping_interval: float = Field(
        15.0, gt=0, description="Seconds between signs of life in a silent stream."
    )
    ping: Literal["comment", "chunk", "none"] = Field(
        "comment",
        description="What a silent stream's signs of life are: comments, which clients must skip; "
        "chunks without text, for clients that wait for events; or none.",
    )
    grace_period: float = Field(
        30.0, ge=0, description="Seconds running requests get to finish at shutdown."
    )
    trust_remote_code: list[str] = Field(
        default_factory=list, description="Models whose own Python code may run."
    )
    ui: bool = Field(
        True, description="Serve the web page at `/ui`, where the extra `ui` is installed."
    )
    log_level: Level = Field("info", description="Least severe log events shown.")
    log_levels: dict[Area, Level] = Field(
        default_factory=dict,
        description="`log_level` of single areas: `requests`, `pool`, `engine`, `text`, `models`, "
        "`server`.",
    )
    log_format: LogFormat = Field(
        "auto",
        description="`human`, `json`, or `auto`: human on a terminal, else JSON.",
    )
    log_file: UserPath | None = Field(
        None,
        description="Where the log goes instead of standard error: 10 MB, and five such files "
        "before it.",
    )

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> "Settings":
        """Without `config`, `default_file` is read where it exists. None in `flags` counts as
        absent. Raises pydantic.ValidationError for a bad value, OSError for an unreadable file.
        """
        file = config or present_default_file()

        class WithFile(cls):  # type: ignore[valid-type, misc]
            model_config = SettingsConfigDict(toml_file=file)

            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

        if config is not None and not config.is_file():
            raise FileNotFoundError(f"no settings file at {config}")
        given = {name: value for name, value in flags.items() if value is not None}
        return cls.model_validate(WithFile(**given).model_dump())

    def keep_alive_of(self, model_id: str) -> float | None:
        """Seconds; None for ever."""
        return parse_seconds(self.keep_alive_by_model.get(model_id, self.keep_alive))

    def replicas_of(self, model_id: str) -> int:
        return self.replicas_by_model.get(model_id, self.replicas)

    def draft_model_of(self, model_id: str) -> str | None:
        """As the operator calls it."""
        if self.speculation == "off":
            return None
        return self.draft_model_by_model.get(model_id, self.draft_model) or None

    @property
    def draft_models(self) -> list[str]:
        """All that are named, as the operator calls them."""
        if self.speculation == "off":
            return []
        named = (self.draft_model, *self.draft_model_by_model.values())
        return list(dict.fromkeys(name for name in named if name))

    def ranks_of(self, model_id: str) -> int:
        return self.ranks_by_model.get(model_id, self.ranks)

    def division_of(self, model_id: str) -> Division:
        return self.division_by_model.get(model_id, self.division)

    @property
    def caches_prefixes(self) -> bool:
        return parse_bytes(self.prefix_cache, 1 << 40) > 0

    @property
    def models_folder(self) -> Path:
        return self.home / "models"

    @property
    def adapters_folder(self) -> Path:
        return self.home / "adapters"

    @property
    def disk_cache_folder(self) -> Path:
        return self.home / "cache"

    @property
    def disk_cache_limit(self) -> int:
        """Bytes; 0 caches nothing."""
        return _bytes_or_off(self.disk_cache) or 0

    @property
    def records_path(self) -> Path:
        return self.home / "responses" / "responses.db"

    @property
    def responses_limit_bytes(self) -> int:
        return parse_bytes(self.responses_limit, 0)

    def load_options(self, model_id: str) -> LoadOptions:
        return LoadOptions(
            memory_limit=self.memory_limit,
            cache_limit=self.cache_limit,
            kv_bits=self.kv_bits,
            prefix_cache=self.prefix_cache,
            disk_cache_folder=str(self.disk_cache_folder) if self.disk_cache_limit else None,
            disk_cache_limit=self.disk_cache_limit,
            disk_cache_daily=_bytes_or_off(self.disk_cache_daily),
            kernels_folder=str(self.home / "kernels"),
            dequantize=self.dequantize,
            openblas=self.openblas,
            max_batch=self.max_batch,
            prefill_chunk=self.prefill_chunk,
            speculation=self.speculation,
            context_length=self.context_length,
            trust_remote_code=model_id in self.trust_remote_code,
            ranks=self.ranks_of(model_id),
            division=self.division_of(model_id),
            ranks_over=self.ranks_over,
        )
