"""Usage, and why an answer ended."""

from collections.abc import Iterable, Iterator

from mlx_server.schemas.anthropic.blocks import Block, ToolResultBlock
from mlx_server.schemas.anthropic.requests import CountTokensRequest, MessagesRequest
from mlx_server.schemas.anthropic.responses import (
    DeltaUsage,
    MessageUsage,
    OutputTokensDetails,
    StopReason,
)
from mlx_server.schemas.internal import Finished, Usage


def message_usage(usage: Usage, marked: bool) -> MessageUsage:
    return MessageUsage(**dict(delta_usage(usage, marked)), service_tier="standard")


def delta_usage(usage: Usage, marked: bool) -> DeltaUsage:
    """Where a request marks what shall be cached, its new tokens count as put into the cache, all
    but the last, which is never taken from there.
    """
    new = usage.prompt_tokens - usage.cached_tokens
    created = max(0, new - 1) if marked else 0
    return DeltaUsage(
        input_tokens=new - created,
        cache_creation_input_tokens=created,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(thinking_tokens=usage.reasoning_tokens),
    )


def is_marked(body: CountTokensRequest) -> bool:
    """Whether anything has a `cache_control`."""
    return body.cache_control is not None or any(
        isinstance(block, Block) and block.cache_control is not None for block in _blocks(body)
    )


def _blocks(body: CountTokensRequest) -> Iterator[object]:
    yield from body.tools
    for content in (body.system, *(message.content for message in body.messages)):
        if not isinstance(content, str):
            yield from _nested(content)


def _nested(content: Iterable[object]) -> Iterator[object]:
    for block in content:
        yield block
        if isinstance(block, ToolResultBlock) and not isinstance(block.content, str):
            yield from block.content


def stop_reason(finished: Finished, body: MessagesRequest) -> StopReason:
    match finished.reason:
        case "tool_calls":
            return "tool_use"
        case "length" if finished.usage.completion_tokens < body.max_tokens:
            return "model_context_window_exceeded"
        case "length":
            return "max_tokens"
        case "stop":
            return "end_turn" if finished.stop is None else "stop_sequence"
