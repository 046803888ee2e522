"""The protocol-free request, and the events that answer it. Every API is translated to these."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_server.engine.protocol import FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's own chat template.

    `messages` are template-ready dictionaries: `role`, `content` (a string), and what a tool call
    or a tool result adds. `continue_final` leaves a last assistant message open, to be continued.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    continue_final: bool = False


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A bare text to continue, tokenized with the tokenizer's own beginning-of-text rule."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
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
class Finished:
    """A choice is complete."""

    choice: int
    reason: FinishReason
    usage: Usage


Event = PromptScored | TextDelta | Finished
