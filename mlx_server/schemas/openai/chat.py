"""OpenAI's wire format of chat completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from mlx_server.errors import BadRequest
from mlx_server.schemas.objects import (
    INT32_MAX,
    INT64_MAX,
    Refusal,
    RequestObject,
    ResponseObject,
    never,
)
from mlx_server.schemas.openai.common import CompletionUsage
from mlx_server.schemas.openai.constraints import ConstrainedRequest
from mlx_server.schemas.openai.messages import MAX_PIECES, ContentPart, Messages
from mlx_server.schemas.openai.tools import (
    AnyTool,
    Few,
    FunctionChoice,
    FunctionDefinition,
    ToolChoice,
)

NO_LIMIT = -1
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

UNSUPPORTED: Mapping[str, Refusal] = {
    "audio": Refusal(never, "it writes text only"),
    "modalities": Refusal(lambda value, body: value == ["text"], 'only ["text"] is'),
    "web_search_options": Refusal(never, "it does not search the web"),
    "moderation": Refusal(never, "it does not moderate"),
}

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


class PromptOptions(RequestObject):
    tools: Few[AnyTool] = Field(
        default_factory=list, description="Functions, and custom tools with their grammars."
    )
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
        "`enable_thinking` to false, `low` and more to true.",
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


class Prediction(RequestObject):
    type: Literal["content"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PIECES)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class ChatCompletionRequest(PromptOptions, ConstrainedRequest):
    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED
    tolerated: ClassVar[Mapping[str, str]] = TOLERATED

    messages: Messages = Field(
        description="Text only. A last message of the assistant is the beginning of the answer."
    )
    max_tokens: int = Field(
        0,
        ge=NO_LIMIT,
        le=INT64_MAX,
        description="Cut to the room that the context has left; 0 and -1 set no limit.",
    )
    max_completion_tokens: int = Field(
        0, ge=NO_LIMIT, le=INT64_MAX, description="Wins over `max_tokens`, unless 0."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    prediction: Prediction | None = Field(
        None,
        description="What much of the answer is likely to be: guessed from, and verified several "
        "tokens at a time. Changes speed, never text.",
    )

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        return self


class TopLogprob(ResponseObject):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseObject):
    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(ResponseObject):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


class CalledCustomTool(ResponseObject):
    name: str
    input: str


class MessageToolCall(ResponseObject):
    """With `function` or `custom`, by type."""

    id: str
    type: Literal["function", "custom"]
    function: CalledFunction | None = None
    custom: CalledCustomTool | None = None


class AssistantMessage(ResponseObject):
    """`reasoning_content` is this server's own."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(ResponseObject):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(ResponseObject):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class FunctionDelta(ResponseObject):
    """The name comes first, then pieces of the arguments."""

    name: str | None = None
    arguments: str


class CustomDelta(ResponseObject):
    """The name comes first, then pieces of the input."""

    name: str | None = None
    input: str


class CallDelta(ResponseObject):
    """`id` and `type` come with the name."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionDelta | None = None
    custom: CustomDelta | None = None


class ChatDelta(ResponseObject):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChatChunkChoice(ResponseObject):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(ResponseObject):
    """`usage` is set only if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
