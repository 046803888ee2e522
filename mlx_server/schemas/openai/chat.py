"""OpenAI's wire format of chat completions."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import TokenLogprob, ToolUse
from mlx_server.schemas.openai.common import (
    INT32_MAX,
    Body,
    CompletionUsage,
    Lenient,
    Refusal,
    finite,
    never,
)
from mlx_server.schemas.openai.constraints import ConstrainedRequest
from mlx_server.schemas.openai.messages import Messages
from mlx_server.schemas.openai.tools import (
    Few,
    FunctionChoice,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    Tool,
    ToolChoice,
    tool_use,
)

NO_LIMIT = -1
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

UNSUPPORTED: Mapping[str, Refusal] = {
    "audio": Refusal(never, "it writes text only"),
    "modalities": Refusal(lambda value, body: value == ["text"], 'only ["text"] is'),
    "web_search_options": Refusal(never, "it does not search the web"),
    "prediction": Refusal(never, "it gains nothing from one"),
    "moderation": Refusal(never, "it does not moderate"),
}
"""What of a chat completion's fields is not honoured."""

TOLERATED: Mapping[str, str] = {
    "metadata": "Nothing is kept of a request.",
    "prompt_cache_key": "Prompts are cached by what they begin with, for all callers.",
    "prompt_cache_options": "See `prompt_cache_key`.",
    "prompt_cache_retention": "See `prompt_cache_key`.",
    "safety_identifier": "Nobody is told.",
    "service_tier": "There is one. `priority` is this server's own.",
    "store": "Nothing is kept of a request.",
    "user": "Callers are told apart by their keys.",
    "verbosity": "Say it in a message, or in `chat_template_kwargs` where a template knows it.",
}
"""Fields that change nothing here."""


class PromptOptions(Lenient):
    """What a chat's prompt is made of besides its messages."""

    tools: Few[Tool] = Field(default_factory=list, description="Functions; no custom tools.")
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    functions: Few[FunctionDefinition] = Field(
        default_factory=list,
        description="Deprecated form of `tools`; the answer has the old form too.",
    )
    function_call: FunctionChoice = Field(
        "auto", description="Deprecated form of `tool_choice`, for `functions`."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None,
        description="Passed to the chat template, as far as it knows it; `none` also sets its "
        "`enable_thinking` to false.",
    )
    thinking_budget: int | None = Field(
        None,
        ge=NO_LIMIT,
        le=INT32_MAX,
        validation_alias=AliasChoices(
            "thinking_budget", "thinking_token_budget", "reasoning_budget"
        ),
        description="Tokens after which the model must end its thinking; -1 for no limit. Also "
        "taken as `thinking_token_budget` and `reasoning_budget`.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables for the model's chat template, such as `enable_thinking`.",
    )

    @model_validator(mode="after")
    def _names_tools_once(self) -> Self:
        if self.tools and self.functions:
            raise BadRequest("`functions` is an old form of `tools`: give one.", param="functions")
        return self

    @property
    def all_tools(self) -> list[Tool]:
        """The tools, in whichever form they were given."""
        return self.tools or [Tool(function=one) for one in self.functions]

    def tool_use(self) -> ToolUse | None:
        """What may come of the tools; None when none may be called. Raises BadRequest."""
        if not self.functions and not isinstance(self.function_call, FunctionName):
            return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        old = self.function_call
        choice: ToolChoice = NamedTool(function=old) if isinstance(old, FunctionName) else old
        return tool_use(self.all_tools, choice, parallel=False)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The template's variables; those that the client names count."""
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        if self.reasoning_effort == "none" or self.thinking_budget == 0:
            variables["enable_thinking"] = False
        return variables | self.chat_template_kwargs

    @property
    def most_thinking(self) -> int | None:
        """Tokens that the model may think for; None for as many as it likes."""
        return None if self.thinking_budget == NO_LIMIT else self.thinking_budget


class ChatCompletionRequest(PromptOptions, ConstrainedRequest):
    """The body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED
    tolerated: ClassVar[Mapping[str, str]] = TOLERATED

    messages: Messages = Field(
        description="Text only. A last message of the assistant is the beginning of the answer."
    )
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Wins over `max_tokens`."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        return self


class TopLogprob(Body):
    """A token that could have stood at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """The log-probability of a token, with the most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Body):
    """The log-probabilities of a choice's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(Body):
    """A function that the model calls; the arguments are the text of a JSON object."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A tool call of a complete answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Body):
    """A complete answer. `reasoning_content` is this server's own."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(Body):
    """One of the answers of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Body):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class FunctionDelta(Body):
    """What a chunk adds to a call: its name first, then pieces of its arguments."""

    name: str | None = None
    arguments: str


class CallDelta(Body):
    """What a chunk adds to the tool call of that index; `id` and `type` come with the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Body):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChatChunkChoice(Body):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Body):
    """One event of a streamed chat completion. `usage` is set only if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities as chat completions write them."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=entry.token,
                logprob=finite(entry.logprob),
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(
                        token=other.token, logprob=finite(other.logprob), bytes=list(other.bytes)
                    )
                    for other in entry.top
                ],
            )
            for entry in tokens
        ],
        refusal=None,
    )
