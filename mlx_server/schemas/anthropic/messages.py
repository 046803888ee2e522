"""Anthropic's wire format of conversations."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_server.schemas.anthropic.blocks import AssistantBlock, SystemBlock, UserBlock
from mlx_server.schemas.objects import RequestObject

MAX_PIECES = 10_000
"""Messages and blocks; checking these takes 50 ms."""
ROLES = ("user", "assistant", "system")


class UserTurn(RequestObject):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(fail_fast=True)]


class AssistantTurn(RequestObject):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(fail_fast=True)]


class SystemTurn(RequestObject):
    """With `clear_at` "next_user_message" it holds until the user speaks again."""

    role: Literal["system"]
    content: str | Annotated[list[SystemBlock], Field(fail_fast=True)] = ""
    clear_at: Literal["next_user_message", "never"] = "never"


def _of_a_role(message: Any) -> Any:
    role = message.get("role") if isinstance(message, dict) else None
    if isinstance(role, str) and role not in ROLES:
        raise ValueError(f"there is no role '{role[:40]}', but {', '.join(ROLES)}")
    return message


Message = Annotated[
    Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")],
    BeforeValidator(_of_a_role),
]


def _few_pieces(messages: Any) -> Any:
    """Raises ValueError for too many pieces to check one by one."""
    if isinstance(messages, list) and len(messages) + _pieces(messages) > MAX_PIECES:
        raise ValueError(f"must have at most {MAX_PIECES} messages and blocks in all")
    return messages


def _pieces(owners: list[Any]) -> int:
    """Blocks of messages, and those within results."""
    count = 0
    for owner in owners[:MAX_PIECES]:
        content = owner.get("content") if isinstance(owner, dict) else None
        if isinstance(content, list):
            count += len(content)
            if "role" in owner:
                count += _pieces(content)
    return count


Messages = Annotated[
    list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_pieces)
]
