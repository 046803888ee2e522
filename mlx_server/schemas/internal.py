"""The protocol-independent request, and the events that answer it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mlx_server.engine.protocol import Sampling
from mlx_server.telemetry.record import RequestRecord


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a whole completion must match. `value` by `kind`: a JSON schema (object or bool);
    nothing; a regular expression; texts; a grammar in Lark or GBNF. `param` names the request's
    field, for errors.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any
    param: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that may be called, perhaps fewer than the template shows: `{"type": "function",
    "function": {…}}` with `name` and perhaps `description`, `parameters`, `strict`, `grammar`: the
    `syntax` (lark or regex) and `definition` of its only parameter, a text. `name` goes with the
    choice `named`.
    """

    tools: list[dict[str, Any]]
    choice: Literal["auto", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """A conversation in chat templates' form, with `content` a string. `continue_final` leaves a
    last assistant message open. `tools` are shown; without `use` none may be called.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    continue_final: bool = False
    use: ToolUse | None = None
    thinking_budget: int | None = None
    """Tokens."""


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """Tokenized with the tokenizer's beginning-of-text rule."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


Charge = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Caller:
    """`key` identifies callers for fair sharing: a key's name, or the client's address. `charge` is
    awaited with a request's tokens, however it ends. `admin`: may go before others.
    """

    request_id: str
    key: str = ""
    admin: bool = False
    charge: Charge | None = field(default=None, repr=False, compare=False)
    record: RequestRecord = field(default_factory=RequestRecord, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Continue a prompt `n` times. `model` "": the loaded one. No `seed`: a random one.
    `max_tokens` is cut to the room that the context has left, and without it there is no other
    limit. `logprobs` and `prompt_logprobs` count alternatives per token; None reports nothing.
    """

    model: str
    prompt: Prompt
    caller: Caller
    sampling: Sampling = field(default_factory=Sampling)
    unasked: frozenset[str] = frozenset()
    """Settings of `sampling` that are the protocol's, for the model's own to replace."""
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    ignore_eos: bool = False
    priority: int = 0
    keep_alive: float | None = None
    """Seconds; None: per settings."""
    prediction: str = ""
    """What much of the answer is likely to be."""


@dataclass(frozen=True, slots=True)
class Alternative:
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`bytes` of successive tokens join to UTF-8; a prompt's first token has no `logprob`. `offset`
    is in characters of the completion, or of the prompt.
    """

    token: str
    bytes: bytes
    logprob: float | None
    top: tuple[Alternative, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_guesses: int = 0
    rejected_guesses: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: until the model was there, from the engine's start on the prompt to the first token,
    from there to the last, and altogether since the request came.
    """

    load: float
    prefill: float
    decode: float
    total: float


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Sent first, once, if `prompt_logprobs` are set."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """`call` counts a choice's calls from 0."""

    choice: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """Deltas join to a JSON object."""

    choice: int
    call: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    choice: int
    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage
    stop: str | None = None
    """The stop string that ended it."""
    timing: Timing | None = field(default=None, compare=False)


Event = PromptScored | TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | Finished
