"""The protocol-free request, and the events that answer it. Every API is translated to these."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mlx_server.engine.protocol import Sampling


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a completion must match from its first character to its last.

    `value` is, by `kind`: a JSON schema (an object or a bool); nothing; a regular expression; a
    list of texts; a grammar in Lark or GBNF. `param` names the request's field that holds it, for
    errors.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any
    param: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools the model may call, and whether it must.

    `tools` are as chat templates read them: objects whose `type` is `function` and whose `function`
    has a `name` and may have `description`, `parameters` and `strict`. With the choice `named`,
    `name` is the tool to call. Tools that may not be called are not here at all, whatever the
    template is shown.
    """

    tools: list[dict[str, Any]]
    choice: Literal["auto", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True
    """Whether one answer may hold several calls."""


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Messages for the model's own chat template.

    `messages` are template-ready dictionaries: `role`, `content` (a string), and what a tool call
    or a tool result adds. `continue_final` leaves a last assistant message open, to be continued.
    `tools` are shown to the template; `use` says what may come of them, None that nothing may.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    continue_final: bool = False
    use: ToolUse | None = None
    thinking_budget: int | None = None
    """Tokens after which the model must end its thinking; None leaves it to the model."""


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """A bare text to continue, tokenized with the tokenizer's own beginning-of-text rule."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """Token ids to continue, taken as they are."""

    ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


Charge = Callable[[int], Awaitable[None]]
"""Is told how many tokens a request has taken."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a request came from.

    `key` tells callers apart, who share the engines fairly: the name of the key that was shown,
    or the client's address. `charge` is to be told of the tokens of prompt and completion, once
    they are known, however the request ends; None where nobody counts them.
    """

    request_id: str
    key: str = ""
    charge: Charge | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One prompt and how to continue it, `n` times.

    `seed` None draws a fresh one; each choice derives its own from it. `max_tokens` None means as
    many as the context holds. `logprobs` counts the alternatives to report per token, None reports
    nothing; `prompt_logprobs` likewise for the prompt's tokens.
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
    """A token that could have stood at a position."""

    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token, with the most likely alternatives.

    `bytes` of successive tokens join to the text in UTF-8. `logprob` is None for the first token
    of a prompt, which nothing precedes. `offset` is where the token's text starts, in characters
    from the beginning of the completion (or of the prompt, for its tokens).
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
    """The prompt itself, sent once per request before anything else when its log-probabilities
    were asked for."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of a choice's text, and the log-probabilities of the tokens that made it."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what a choice thinks before its answer."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A choice calls a tool: its `call`-th, counted from 0. Its arguments follow."""

    choice: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a tool call's arguments, which together are a JSON object."""

    choice: int
    call: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is complete."""

    choice: int
    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage


Event = PromptScored | TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | Finished
