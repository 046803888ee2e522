"""The messages between the front process and an engine process, shared by both sides.

Plain msgspec structs in MessagePack frames: a 4-byte big-endian length, then that many bytes.
The engine speaks token ids only; text belongs to the front.
"""

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
"""Kinds of model that make vectors of texts and do nothing else."""
HEADER = struct.Struct(">I")
MAX_FRAME = 256 * 1024 * 1024
MOST_ROW_ITEMS, MOST_STEP_ITEMS = 20_000, 200_000
"""Of llguidance's parser, the same where a grammar is checked and where it is followed."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn from the logits.

    The order is: bias, penalties, temperature, top-k, top-p, min-p, draw. Tokens that a grammar
    rules out have no part in any of it. Temperature 0 takes the most likely token.
    `repetition_penalty` looks at prompt and completion, `presence_penalty` and
    `frequency_penalty` at the completion alone. The draw of step i depends on `seed` and i only.
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
    """How an engine loads and runs its model."""

    memory_limit: str = "80%"
    """For this engine's arrays: a share of what the device reports, or bytes such as "12GB"."""
    cache_limit: str | None = None
    """Freed buffers that MLX may keep for reuse; None takes an eighth of the memory limit."""
    kv_limit: int | None = None
    """Bytes for all KV caches together; None takes what the memory limit leaves."""
    kv_share: float = 1.0
    """How much of that to use at first, by an engine whose predecessor ran out of memory."""
    kv_bits: Literal[4, 8] | None = None
    """Bits of quantized KV caches; None leaves them as computed."""
    prefix_cache: str = "100%"
    """Bytes, or share of the KV limit, that the prefix cache may take of what requests leave."""
    disk_cache_folder: str | None = None
    """Where blocks of the prefix cache are kept in files, for all models; None keeps none."""
    disk_cache_limit: int = 0
    """Bytes that all files in that folder may take."""
    dequantize: Literal["auto", "always", "never"] = "auto"
    """`auto`: on a CPU device, to float32, when that fits the memory limit."""
    openblas: str = "auto"
    """`auto`, `off`, or the path of the library to load before MLX on a Linux CPU."""
    max_batch: int = 32
    prefill_chunk: int | None = None
    """Prompt tokens computed per turn; None chooses by device."""
    context_length: int | None = None
    """Caps the model's own context."""
    trust_remote_code: bool = False


PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"]


class Embedding(msgspec.Struct, frozen=True):
    """How an embedding model makes a text's vector of the vectors of its tokens.

    The outcomes of several ways of `pooling` are put side by side; `normalize` scales the whole to
    length 1.
    """

    pooling: list[PoolingMode]
    normalize: bool


# front → engine


class Load(msgspec.Struct, frozen=True, tag="load"):
    """The first frame: load the model folder at `path`."""

    path: str
    options: LoadOptions
    adapter_path: str | None = None
    """A folder of LoRA adapters to apply."""
    embedding: Embedding | None = None
    """None for a model that generates."""


class Generate(msgspec.Struct, frozen=True, tag="generate", omit_defaults=True):
    """Continue `prompt`. Its tokens come back in `Tokens` frames under `id`.

    The last `generated` tokens of `prompt` were sampled by an earlier engine: they count as
    completion for penalties and for the position in the random sequence.
    `logprobs` asks for log-probabilities of each sampled token and of that many most likely ones;
    `prompt_logprobs` asks the same of the prompt's tokens.
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
    """What the completion must match, as llguidance reads grammars; None for anything at all.

    One of `stop_tokens`, or without any, of the model's own, comes where it may end.
    """
    caller: str = ""
    priority: int = 0
    """Requests with lower numbers are admitted first; callers take turns within a priority."""


class Embed(msgspec.Struct, frozen=True, tag="embed", omit_defaults=True):
    """Make a vector of each of `texts`. They come back in `Tokens` frames under `id`, in any order.

    A text without tokens is passed over: an earlier engine has made its vector. `dimensions` keeps
    that many of a vector's first numbers, scaled to length 1.
    """

    id: int
    texts: list[list[int]]
    dimensions: int | None = None
    caller: str = ""
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests; nothing more is sent for them."""

    ids: list[int]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the process."""


# engine → front


class Device(msgspec.Struct, frozen=True):
    """Where MLX computes: `metal`, `cuda` or `cpu`, and its memory in bytes."""

    name: str
    memory: int


class Memory(msgspec.Struct, frozen=True):
    """Bytes, as MLX counts them."""

    active: int
    peak: int
    cache: int
    limit: int


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
    """Tokens that the KV limit holds for one request, at most the context length."""
    load_seconds: float
    dequantized: bool
    blas: str | None
    memory: Memory
    width: int = 0
    """Numbers in a vector of an embedding model; 0 for a model that generates."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The model could not be loaded; the process ends after this frame."""

    message: str


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities at one position, of the unmodified distribution."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Row(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one request got in one step.

    `cached` is how many prompt tokens came from a cache, sent with a request's first row.
    A stop token ends the tokens and is included in them. `vectors` are pairs of a text's index and
    its vector, in float32 numbers, the lowest byte first.
    """

    id: int
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    cached: int | None = None
    vectors: list[tuple[int, bytes]] | None = None


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """The engine is about to work on these requests for the first time, or again.

    Whatever has not begun when an engine dies had no part in its death.
    """

    ids: list[int]


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """One step's outcome for every request that got something."""

    rows: list[Row]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """This request failed; the others go on."""

    id: int
    message: str


class PrefixStats(msgspec.Struct, frozen=True):
    """The prefix cache: what it holds, and since the engine began, what it saved."""

    blocks: int
    bytes: int
    prompt_tokens: int
    """Of all requests admitted."""
    cached_tokens: int
    """Of those, how many did not have to be computed."""


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """The engine's own figures, sent while it works and when it falls idle."""

    running: int
    prefilling: int
    waiting: int
    step_seconds: float
    kv_bytes: int
    """Of the running requests; the prefix cache's come on top."""
    preempted: int
    """How often a request had to give up its place and start over, since the engine began."""
    prefix: PrefixStats
    memory: Memory
    longest_turn: float = 0.0
    """Seconds that the longest turn took since the engine began; nothing is sent during a turn."""


ToEngine = Load | Generate | Embed | Abort | Stop
ToFront = Ready | LoadFailed | Begun | Tokens | Failed | Stats

encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode


def frame(message: msgspec.Struct) -> bytes:
    """Encode `message` with its length in front.

    Raises ValueError when it is larger than `MAX_FRAME`.
    """
    body = encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes exceeds the {MAX_FRAME} of a frame")
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Splits a byte stream into frames. Feed it what arrives; it yields whole bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[start + HEADER.size : end])
            start = end
        del self._buffer[:start]
