"""OpenAI's wire format of requests for responses."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from mlx_server.errors import BadRequest
from mlx_server.schemas.objects import (
    INT32_MAX,
    INT64_MAX,
    Name,
    Refusal,
    RequestObject,
    empty,
    never,
)
from mlx_server.schemas.openai.chat import NO_LIMIT, ReasoningEffort
from mlx_server.schemas.openai.common import GenerationRequest, ModelChoice
from mlx_server.schemas.openai.responses.items import Items
from mlx_server.schemas.openai.responses.tools import ToolChoice, Tools
from mlx_server.schemas.sizes import Schema

MAX_METADATA = 16
MAX_NEW_ITEMS = 20

Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=MAX_METADATA),
]
Id = Annotated[str, StringConstraints(min_length=1, max_length=128)]

UNSUPPORTED: Mapping[str, Refusal] = {
    "background": Refusal(lambda value, body: value is False, "wait for the answer, or stream it"),
    "background_options": Refusal(empty),
    "prompt": Refusal(never, "it keeps no prompts; send `instructions` and `input`"),
    "moderation": Refusal(never, "it does not moderate"),
}
TOLERATED: Mapping[str, str] = {
    "access_programs": "There are none.",
    "context_management": "Nothing is compacted; see `truncation`.",
    "image": "Pictures are refused.",
    "prompt_cache_options": "Prompts are cached by what they begin with.",
    "prompt_cache_retention": "Prompts are cached by what they begin with.",
    "service_tier": "There is one. `priority` is this server's own.",
}


class Reasoning(RequestObject):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(RequestObject):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("a format of type 'json_schema' must have a `schema`")
        return self


class TextOptions(RequestObject):
    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))
    verbosity: Literal["low", "medium", "high"] | None = None


class ConversationId(RequestObject):
    id: Id


class InputOptions(RequestObject):
    input: str | Items = Field("", description="A text, or items. Text only.")
    instructions: str | None = None
    previous_response_id: Id | None = Field(
        None, description="A stored response that this one goes on from."
    )
    conversation: Id | ConversationId | None = None
    tools: Tools = Field(
        default_factory=list,
        description="Functions, custom tools and `namespace` groups of them; hosted tools are "
        "passed over.",
    )
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Field(default_factory=Reasoning)
    text: TextOptions = Field(default_factory=TextOptions)
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="`auto` leaves out the oldest items of what does not fit."
    )
    thinking_budget: int | None = Field(
        None, ge=NO_LIMIT, le=INT32_MAX, description="As in chat completions."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the model's chat template."
    )

    @model_validator(mode="after")
    def _goes_on_from_one(self) -> Self:
        if self.previous_response_id is not None and self.conversation is not None:
            raise BadRequest(
                "Give `previous_response_id` or `conversation`, not both.", param="conversation"
            )
        return self

    @property
    def conversation_id(self) -> str | None:
        if isinstance(self.conversation, ConversationId):
            return self.conversation.id
        return self.conversation


class ResponseRequest(InputOptions, GenerationRequest):
    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED
    tolerated: ClassVar[Mapping[str, str]] = TOLERATED

    max_output_tokens: int = Field(
        0, ge=0, le=INT64_MAX, description="Cut to the room that the context has left; 0: no limit."
    )
    store: bool = Field(
        True, description="Kept for `previous_response_id` and `GET`, as the settings bound it."
    )
    include: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="`reasoning.encrypted_content` and `message.output_text.logprobs`; others "
        "concern hosted tools.",
    )
    metadata: Metadata = Field(default_factory=dict)
    top_logprobs: int = Field(0, ge=0, le=20)
    max_tool_calls: int | None = Field(
        None, ge=0, le=INT64_MAX, description="Repeated; it counts calls of hosted tools."
    )
    prompt_cache_key: str | None = Field(
        None, description="Repeated; prompts are cached by what they begin with."
    )
    safety_identifier: str | None = Field(None, description="Repeated; nobody is told.")
    user: str | None = Field(None, description="Repeated; callers are told apart by their keys.")

    @model_validator(mode="after")
    def _is_one_answer(self) -> Self:
        if self.n != 1:
            raise BadRequest("A response is one answer.", param="n")
        return self

    @property
    def with_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in self.include


class InputTokensRequest(ModelChoice, InputOptions):
    pass


class NewItems(RequestObject):
    items: Annotated[Items, Field(min_length=1, max_length=MAX_NEW_ITEMS)]


class NewConversation(RequestObject):
    items: Annotated[Items, Field(max_length=MAX_NEW_ITEMS)] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)


class ConversationChange(RequestObject):
    metadata: Metadata
