"""Messages between the front and an engine process: a 4-byte big-endian length, then MessagePack.

The engine speaks token ids only; text belongs to the front.
"""

import struct
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Literal

import msgspec

from mlx_server.dimensions import Division
from mlx_server.units import parse_bytes

FinishReason = Literal["stop", "length"]
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
"""Model types that only make vectors."""
HEADER = struct.Struct(">I")
MAX_FRAME = 256 * 1024 * 1024
MOST_ROW_ITEMS, MOST_STEP_ITEMS = 20_000, 200_000
"""llguidance's limits, the same where a grammar is checked and where it is used."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """In order: bias, penalties, temperature, top-k, top-p, min-p, draw.

    Tokens that a grammar rules out have no part in any of it. Temperature 0 takes the likeliest.
    `repetition_penalty` looks at prompt and completion, the other penalties at the completion. The
    draw of step i depends on `seed` and i only.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


class LoadOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    memory_limit: str = "80%"
    """Bytes such as "12GB", or a share of what the device has."""
    cache_limit: str | None = None
    """Freed buffers kept for reuse; None takes an eighth of the memory limit."""
    wired_limit: int = 0
    """Bytes of weights that may be wired, on Metal: all of them or none."""
    kv_limit: int | None = None
    """Bytes for all KV caches; None takes what the memory limit leaves."""
    kv_share: float = 1.0
    """The share of `kv_limit` to use at first, after an engine ran out of memory."""
    kv_bits: Literal[4, 8] | None = None
    """None does not quantize KV caches."""
    prefix_cache: str = "100%"
    """Bytes, or share of the KV limit, at most; requests come first."""
    disk_cache_folder: str | None = None
    """For blocks of the prefix cache of all models; None keeps none."""
    disk_cache_limit: int = 0
    """Bytes of all files in that folder."""
    disk_cache_daily: int | None = None
    """Bytes written to that folder in a day, at most."""
    kernels_folder: str | None = None
    """Where kernels that MLX compiles are kept; None leaves that to MLX."""
    dequantize: Literal["auto", "always", "both", "packed", "never"] = "auto"
    """`auto`: to float32 on a CPU, if that fits the memory limit. `packed`: all but quantized
    weights, by which a CPU with the library for it multiplies as they are. `both` has them so
    for few rows and in float32 for more.
    """
    openblas: str = "auto"
    """`auto`, `off`, or the path of a library, for a Linux CPU."""
    max_batch: int = 32
    prefill_chunk: int | None = None
    """Prompt tokens per turn; None sizes it by measured speed."""
    speculation: Literal["auto", "off"] = "off"
    """`auto`: guess tokens from prompt and answer, and verify several in one step."""
    draft_path: str | None = None
    """The folder of a smaller model of the same vocabulary, which guesses tokens."""
    context_length: int | None = None
    """Caps the model's own."""
    trust_remote_code: bool = False
    ranks: int = 1
    """Processes among which the model is divided; limits are those of each."""
    division: Division = "auto"
    """A part of each layer for each, or whole layers; `auto`: these where there is no way to the
    other."""
    ranks_over: Literal["ring", "nccl"] = "ring"
    """`nccl`: as `Nccl`, where `Load` names no other fabric."""


class RankHost(msgspec.Struct, frozen=True):
    """The machine of a rank: what operators call it, and its IPv4 addresses for MLX's ring."""

    name: str
    addresses: list[str]


RdmaDevices = list[str | list[str] | None]
"""Of a machine, its device or devices for RDMA with each machine, None for itself."""


class Rdma(msgspec.Struct, frozen=True, tag="jaccl"):
    """JACCL, through `devices` by rank. With `around` only neighbours have any."""

    devices: list[RdmaDevices]
    around: bool


class Nccl(msgspec.Struct, frozen=True, tag="nccl"):
    """Between NVIDIA GPUs, of which each rank has one."""


Fabric = Rdma | Nccl
"""What ranks talk over, if not MLX's ring of TCP connections."""


PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"]


class Embedding(msgspec.Struct, frozen=True):
    """Vectors of several ways of `pooling` are concatenated; `normalize` scales to length 1. With
    `scores` the model judges pairs of texts, and gives one number in place of a vector.
    """

    pooling: list[PoolingMode]
    normalize: bool
    scores: bool = False


# front → engine


class Load(msgspec.Struct, frozen=True, tag="load"):
    """The first frame."""

    path: str
    options: LoadOptions
    adapter_path: str | None = None
    """A folder of LoRA adapters."""
    embedding: Embedding | None = None
    """None for a model that generates."""
    hosts: list[RankHost] = []
    """Of each rank of a model on several machines; empty if all ranks are on this one."""
    fabric: Fabric | None = None


class Tokenizer(msgspec.Struct, frozen=True, tag="tokenizer"):
    """The model's tokenizer.json, where its folder has none that serves for grammars.

    Comes before any request.
    """

    content: bytes


class Generate(msgspec.Struct, frozen=True, tag="generate", omit_defaults=True):
    """Continue `prompt`, whose last `generated` tokens an earlier engine sampled.

    Those count as completion. `logprobs` asks for log-probabilities of each sampled token and of
    that many most likely ones, `prompt_logprobs` for the same of the prompt.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_tokens: list[int] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    generated: int = 0
    grammar: str | None = None
    """As llguidance reads it; a stop token, without any one of the model's own, ends it."""
    caller: str = ""
    priority: int = 0
    """Lower comes first; callers take turns within a priority."""
    prediction: list[int] = []
    """What much of the completion is likely to be."""


class Embed(msgspec.Struct, frozen=True, tag="embed", omit_defaults=True):
    """Make vectors of `texts`, in any order; an empty one has been done by an earlier engine.

    `dimensions` keeps that many numbers, scaled to length 1. `seconds`: of pairs, where in each the
    second text begins.
    """

    id: int
    texts: list[list[int]]
    dimensions: int | None = None
    caller: str = ""
    priority: int = 0
    seconds: list[int] = []


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests; nothing more is sent for them."""

    ids: list[int]


class Stop(msgspec.Struct, frozen=True, tag="stop"): ...


# engine → front


class Device(msgspec.Struct, frozen=True):
    """`metal`, `cuda` or `cpu`, and its bytes: all, those that models may use, and of these those
    that can be kept from being paged out.

    `packs`: a CPU whose engines multiply by quantized weights as they are.
    """

    name: str
    memory: int
    usable: int
    wirable: int = 0
    packs: bool = False

    def budget(self, limit: str) -> int:
        """Bytes: `limit`, which may be a share of all memory, but no more than is usable."""
        return min(parse_bytes(limit, self.memory), self.usable)

    def wired(self, limit: str) -> int:
        """Bytes that may be kept from being paged out: `auto`, `off`, or the most."""
        match limit.strip():
            case "auto":
                return self.wirable
            case "off":
                return 0
            case most:
                return min(parse_bytes(most, 0), self.wirable)


class Memory(msgspec.Struct, frozen=True):
    """Bytes, as MLX counts them."""

    active: int
    peak: int
    cache: int
    limit: int
    wired: int = 0


def total_memory(parts: Iterable[Memory]) -> Memory:
    known = list(parts)
    return Memory(
        active=sum(one.active for one in known),
        peak=sum(one.peak for one in known),
        cache=sum(one.cache for one in known),
        limit=sum(one.limit for one in known),
        wired=sum(one.wired for one in known),
    )


class Sharing(StrEnum):
    """Which requests may be in one pass of the model."""

    ANY = "any length"
    EQUAL = "equal length"
    NONE = "one at a time"


class Batching(msgspec.Struct, frozen=True):
    """What a model has been found to compute rightly; `reason` says why it is not everything."""

    decode: Sharing
    prefill: Sharing
    reason: str | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded."""

    pid: int
    device: str
    model_type: str
    context_length: int
    vocab_size: int
    weights_bytes: int
    kv_limit: int
    longest_sequence: int
    """Tokens of one request that the KV limit and the context hold."""
    load_seconds: float
    dequantized: bool
    blas: str | None
    memory: Memory
    width: int = 0
    """Numbers in a vector; 0 for a model that generates."""
    mixed_steps: str | None = None
    """Whether chunks of prompts share passes with decode steps: `on`, or `off: ` and why."""
    batching: Batching | None = None
    """None for a model that makes vectors."""
    own_head: bool = False
    """Whether a head of the model's own guesses tokens."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The process ends after this frame."""

    message: str


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms, of the unmodified distribution."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Row(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one request got in one step.

    `tokens` include the stop token. The first row says how many prompt tokens were `cached`.
    `vectors` are pairs of a text's index and little-endian float32 numbers. Of the tokens `guessed`
    for this step `accepted` came true.
    """

    id: int
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    cached: int | None = None
    vectors: list[tuple[int, bytes]] | None = None
    guessed: int = 0
    accepted: int = 0


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """The engine starts on these requests, or starts again.

    Whatever has not begun when it dies had no part in its death.
    """

    ids: list[int]


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """What one step gave each request."""

    rows: list[Row]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """This request failed; the others go on."""

    id: int
    message: str


class DiskStats(msgspec.Struct, frozen=True):
    """Of one model's blocks; bytes and refusals since the engine started."""

    blocks: int
    written_bytes: int
    read_bytes: int
    refused_blocks: int
    """Not written: the disk, its limit or the day's had no room."""


class PrefixStats(msgspec.Struct, frozen=True):
    blocks: int
    bytes: int
    prompt_tokens: int
    """Of all requests admitted since the engine started."""
    cached_tokens: int
    """Of those, not computed."""
    disk: DiskStats | None = None


class RankStats(msgspec.Struct, frozen=True):
    """One of the processes of a divided model."""

    rank: int
    pid: int
    memory: Memory | None
    """None until it has told."""
    host: str = ""
    """Its machine, if the ranks are on several."""


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """Sent while the engine works and when it falls idle."""

    running: int
    prefilling: int
    waiting: int
    step_seconds: float
    kv_bytes: int
    """Of running requests, without the prefix cache."""
    preempted: int
    """How often a request had to give up its place and start over."""
    prefix: PrefixStats
    memory: Memory
    longest_turn: float = 0.0
    """Seconds; nothing is sent during a turn."""
    guessed: int = 0
    """Tokens guessed so far, and how many of them came true."""
    accepted: int = 0
    ranks: list[RankStats] = []
    """Of a divided model. `memory` is that of all together, other bytes are of each."""


ToEngine = Load | Tokenizer | Generate | Embed | Abort | Stop
ToFront = Ready | LoadFailed | Begun | Tokens | Failed | Stats

encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode


def frame(message: msgspec.Struct) -> bytes:
    """Raises ValueError beyond `MAX_FRAME`."""
    body = encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes exceeds the {MAX_FRAME} of a frame")
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Splits a byte stream into bodies of frames. Raises msgspec.DecodeError for one that no
    sender of ours would send.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME:
                raise msgspec.DecodeError(f"a frame of {length} bytes")
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[start + HEADER.size : end])
            start = end
        del self._buffer[:start]
