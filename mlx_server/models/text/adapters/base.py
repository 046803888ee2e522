"""What a model family must tell the front: how prompts are rendered, where turns end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers import Tokenizer

from mlx_server.schemas.internal import ChatPrompt, Constraint


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can be asked for, as far as its files tell."""

    chat: bool
    tools: bool
    reasoning: bool
    system_role: bool
    tool_syntax: str | None = None
    """How calls are written: a family's way, or `generic`, which the prompt asks for in words."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The markers around a block of thinking, such as `<think>` and `</think>`."""

    start: str
    end: str


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How tool calls stand in a model's text: each, or a list of them, between two markers.

    An `end` of "" is the end of the answer. `json` says that what stands between is, or is a list
    of, JSON objects whose keys `name` and `arguments` come in this order, so that it can be read
    while it comes; anything else is read by `Adapter.parse_calls` when it is whole.
    """

    start: str
    end: str
    json: bool
    arguments: str = "arguments"
    """The key of the arguments; Llama says `parameters`."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """What is more than plain text in a model's completion.

    `visible` are special tokens among the markers, with their texts: they have no bytes in running
    text, and must be seen all the same.
    """

    reasoning: Reasoning | None = None
    calls: CallSyntax | None = None
    visible: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A conversation in tokens, and what its completion is bound to.

    `grammar` covers the whole completion, thinking included. `thinking` says that the prompt leaves
    a block of thinking open; `forced` that the completion is, after any thinking, calls alone.
    """

    tokens: list[int]
    grammar: str | None = None
    thinking: bool = False
    forced: bool = False


class Adapter(Protocol):
    """The text side of one loaded model. Methods block and are safe to call from any thread."""

    family: str
    capabilities: Capabilities
    stop_tokens: frozenset[int]
    syntax: Syntax
    tokenizer: Tokenizer

    def render(self, prompt: ChatPrompt) -> list[int]:
        """Token ids of the conversation, ready to be continued.

        Raises BadRequest when the model has no template or its template refuses the messages.
        """

    def prepare(self, prompt: ChatPrompt, constraint: Constraint | None) -> PreparedChat:
        """The same, with what the completion is bound to by its constraint, tools and budget.

        Raises BadRequest for what cannot be kept, too.
        """

    def bind(self, constraint: Constraint) -> str:
        """The grammar of a bare text's completion. Raises BadRequest."""

    def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Names and arguments (JSON objects) of the calls in `text`; none if it is garbled.

        `text` stood between the markers of `syntax.calls`, in an answer to a prompt with `tools`.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of a bare text, with the tokenizer's beginning-of-text token if it has one."""

    def surely_exceeds(self, text: str, limit: int) -> bool:
        """Whether `text` has more than `limit` tokens, found without tokenizing much more."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that `token` stands for in running text; empty for special tokens."""

    def token_name(self, token: int) -> str:
        """What the vocabulary calls `token`: the way to show a special one."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out."""
