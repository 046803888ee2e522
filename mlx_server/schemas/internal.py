"""The protocol-free request, and the events that answer it. Every API is translated to these."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mlx_server.engine.protocol import Sampling


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a completion must match as a whole.

    `value` by `kind`: a JSON schema (an object or a bool); nothing; a regular expression; a list of
    texts; a grammar in Lark or GBNF. `param` names the request's field, for errors.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any
    param: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that may be called, which are fewer than the template is shown.

    `tools` are as chat templates read them: `{"type": "function", "function": {…}}` with a `name`
    and possibly `description`, `parameters` and `strict`. `name` goes with the choice `named`.
    """

    tools: list[dict[str, Any]]
    choice: Literal["auto", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True
    """Whether one answer may hold several calls."""


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """A conversation for the model's chat template.

    `messages` are as templates read them, with `content` a string. `continue_final` leaves a last
    assistant message open. `tools` are shown to the template; without `use` none may be called.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    continue_final: bool = False
    use: ToolUse | None = None
    thinking_budget: int | None = None
    """Tokens after which the model must end its thinking; None leaves it to the model."""


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """A text, tokenized with the tokenizer's own beginning-of-text rule."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


Charge = Callable[[int], Awaitable[None]]
"""Is told how many tokens a request has taken."""


@dataclass(frozen=True, slots=True)
class Caller:
    """`key` identifies callers for fair sharing: a key's name, or the client's address.

    `charge` is awaited with the tokens that a request took, however it ends.
    """

    request_id: str
    key: str = ""
    charge: Charge | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A prompt and how to continue it, `n` times.

    Without `seed` one is drawn; without `max_tokens` the context is the limit. `logprobs` and
    `prompt_logprobs` count the alternatives to report per token; None reports nothing.
    """

    model: str
    prompt: Prompt
    caller: Caller
    sampling: Sampling = field(default_factory=Sampling)
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
    """Seconds that the model stays loaded after this request; None leaves it to the settings."""


@dataclass(frozen=True, slots=True)
class Alternative:
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`bytes` of successive tokens join to UTF-8 text; a prompt's first token has no `logprob`.

    `offset`, in characters, counts from the beginning of the completion, or of the prompt.
    """

    token: str
    bytes: bytes
    logprob: float | None
    top: tuple[Alternative, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one choice."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion's, those the model thought with."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Sent once, first, if `prompt_logprobs` were asked for."""

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
    """`call` counts the calls of a choice from 0."""

    choice: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call's arguments, which together are a JSON object."""

    choice: int
    call: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    choice: int
    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage


Event = PromptScored | TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | Finished
