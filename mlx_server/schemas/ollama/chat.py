"""Ollama's wire format of chats and generations."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlx_server.schemas.objects import Name, Refusal, RequestObject, empty
from mlx_server.schemas.ollama.common import NO_IMAGES, GenerationRequest
from mlx_server.schemas.sizes import check_size

MAX_MESSAGES = 10_000
MAX_CALLS = 1_000
MAX_TOOLS = 128


def _lower(role: Any) -> Any:
    return role.lower() if isinstance(role, str) else role


Role = Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_lower)]


class TurnFunction(RequestObject):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class TurnCall(RequestObject):
    id: str | None = None
    function: TurnFunction


class Turn(RequestObject):
    unsupported: ClassVar[Mapping[str, Refusal]] = {"images": NO_IMAGES}

    role: Role
    content: str = ""
    thinking: str = ""
    tool_calls: Annotated[
        list[TurnCall], Field(default_factory=list, max_length=MAX_CALLS, fail_fast=True)
    ]
    tool_name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _calls_as_the_assistant(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' cannot have tool calls")
        return self


class ToolFunction(RequestObject):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters.get("type", "object") != "object":
            raise ValueError("`parameters` must be a JSON schema of type 'object'")
        return self


class TurnTool(RequestObject):
    type: Literal["function"] = "function"
    function: ToolFunction


Tools = Annotated[
    list[TurnTool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(check_size)
]


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Turn], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        default_factory=list,
        description="Text only. A last message of the assistant is the beginning of the answer. "
        "None: the model is loaded, or unloaded with a `keep_alive` of 0.",
    )
    tools: Tools = Field(default_factory=list)


class GenerateRequest(GenerationRequest):
    unsupported: ClassVar[Mapping[str, Refusal]] = {
        "images": NO_IMAGES,
        "suffix": Refusal(empty, "it does not fill in"),
        "template": Refusal(empty, "the model's own is used, or none with `raw`"),
        "context": Refusal(empty, "send the conversation to /api/chat"),
    }

    prompt: str = Field(
        "",
        description="Empty: the model is loaded, or unloaded with a `keep_alive` of 0.",
    )
    system: str = ""
    raw: bool = Field(False, description="Take the prompt as it is, without the template.")

    @model_validator(mode="after")
    def _raw_is_bare(self) -> Self:
        if self.raw and self.system:
            raise ValueError("`raw` takes no `system`: put it into the prompt")
        return self
