"""Anthropic's wire format of requests."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlx_server.schemas.anthropic.blocks import CacheControl, TextBlock
from mlx_server.schemas.anthropic.messages import Messages
from mlx_server.schemas.anthropic.tools import ToolChoice, Tools
from mlx_server.schemas.objects import (
    INT32_MAX,
    INT64_MAX,
    NonEmpty,
    Refusal,
    RequestObject,
    empty,
    never,
)
from mlx_server.schemas.sizes import Schema

MAX_STOPS = 256

TOLERATED: Mapping[str, str] = {
    "betas": "As the header `anthropic-beta`: any are taken.",
    "billing_policy": "Nothing is billed.",
    "diagnostics": "Usage tells what came from the cache.",
    "fallback_credit_token": "Nothing is billed.",
    "fallbacks": "The model that is named answers.",
    "inference_geo": "This machine.",
    "metadata": "Callers are told apart by their keys.",
    "service_tier": "There is one.",
    "speed": "As fast as it goes.",
    "user_profile_id": "Callers are told apart by their keys.",
    "workspace_id": "There is one.",
}
UNSUPPORTED: Mapping[str, Refusal] = {
    "compaction": Refusal(never, "ask for a summary in a message"),
    "container": Refusal(never, "it runs no code"),
    "mcp_servers": Refusal(empty, "it connects to none; list their tools in `tools`"),
    # By this code the SDK knows to send all messages itself.
    "thread": Refusal(
        never, "it keeps no conversations; send all messages", "thread_unsupported_request"
    ),
}


class ThinkingConfig(RequestObject):
    """A `budget_tokens` goes with the type `enabled`."""

    type: Literal["enabled", "adaptive", "disabled", "between_tools"]
    budget_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    display: Literal["summarized", "omitted"] = "summarized"

    @property
    def wanted(self) -> bool:
        return self.type in ("enabled", "adaptive")


class JsonOutputFormat(RequestObject):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(RequestObject):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutputFormat | None = None


class CountTokensRequest(RequestObject):
    model: NonEmpty
    messages: Messages = Field(
        description="Text only. A last message of the assistant is the beginning of the answer."
    )
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    tools: Tools = Field(
        default_factory=list,
        description="Tools that this server does not know, such as web search, are passed over.",
    )
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = Field(
        None, description="Left out, the model's template decides."
    )
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    output_format: JsonOutputFormat | None = Field(
        None, description="Old place of `output_config.format`."
    )
    cache_control: CacheControl | None = Field(
        None, description="Prompts are cached anyway; it changes how usage is told."
    )
    context_management: dict[str, Any] | None = Field(
        None, description="No edits are applied, and the answer says so."
    )


class MessagesRequest(CountTokensRequest):
    tolerated: ClassVar[Mapping[str, str]] = TOLERATED
    unsupported: ClassVar[Mapping[str, Refusal]] = UNSUPPORTED

    max_tokens: int = Field(
        ge=0,
        le=INT64_MAX,
        description="Cut to the room that the context has left; 0 fills the cache and no more.",
    )
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        default_factory=list, description="Empty texts do not count."
    )
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=INT32_MAX, description="0 for no limit.")
