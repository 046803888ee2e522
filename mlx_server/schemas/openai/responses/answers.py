"""OpenAI's wire format of responses and conversations."""

from typing import Any, Literal

from mlx_server.schemas.objects import ResponseObject


class InputTokensDetails(ResponseObject):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseObject):
    reasoning_tokens: int


class ResponseUsage(ResponseObject):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFault(ResponseObject):
    code: str
    message: str


class IncompleteDetails(ResponseObject):
    reason: str


class ResponseBody(ResponseObject):
    """Besides these fields, those of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: dict[str, str] | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseEvent(ResponseObject):
    """Besides these fields, those of its type."""

    type: str
    sequence_number: int


class ResponseDeleted(ResponseObject):
    id: str
    object: Literal["response"]
    deleted: bool


class ItemList(ResponseObject):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class InputTokens(ResponseObject):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Conversation(ResponseObject):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(ResponseObject):
    id: str
    object: Literal["conversation.deleted"]
    deleted: bool
