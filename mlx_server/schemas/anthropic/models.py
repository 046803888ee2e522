"""Anthropic's wire format of models."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_server.schemas.objects import ResponseObject

MOST_MODELS = 1000
Limit = Annotated[int, Field(ge=1, le=MOST_MODELS)]


class Support(ResponseObject):
    supported: bool


class ThinkingTypes(ResponseObject):
    adaptive: Support
    between_tools: Support
    disabled: Support
    enabled: Support


class ThinkingSupport(Support):
    types: ThinkingTypes


class EffortSupport(Support):
    low: Support
    medium: Support
    high: Support
    xhigh: Support
    max: Support


class ServerToolsSupport(Support):
    code_execution: Support
    web_search: Support


class Capabilities(ResponseObject):
    batch: Support
    citations: Support
    code_execution: Support
    context_management: Support
    effort: EffortSupport
    image_input: Support
    pdf_input: Support
    server_tools: ServerToolsSupport
    structured_outputs: Support
    thinking: ThinkingSupport


class ModelInfo(ResponseObject):
    """`max_tokens`: the context is for prompt and answer together."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None
    capabilities: Capabilities | None


class ModelPage(ResponseObject):
    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None
