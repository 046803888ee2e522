"""What OpenAI's answers and chunks share."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar
from uuid import uuid4

import msgspec

from mlx_server import __version__
from mlx_server.api.generation import Accepted
from mlx_server.schemas.internal import Usage
from mlx_server.schemas.openai.common import (
    CompletionTokensDetails,
    CompletionUsage,
    PromptTokensDetails,
)

SYSTEM_FINGERPRINT = f"mlx-server-{__version__}"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Header:
    id: str
    created: int
    model: str

    @classmethod
    def fresh(cls, id_prefix: str, accepted: Accepted) -> Self:
        return cls(f"{id_prefix}-{uuid4().hex}", int(time.time()), accepted.model)


class ChunkTemplate(Generic[Key]):
    """Writes chunks that differ only in a key (such as a choice's index) and a text; renders one
    per key in full.
    """

    _HOLE = "\0"

    def __init__(self, render: Callable[[Key, str], bytes]) -> None:
        self._render = render
        self._around: dict[Key, tuple[bytes, bytes]] = {}

    def fill(self, key: Key, text: str) -> bytes:
        around = self._around.get(key)
        if around is None:
            around = self._around[key] = self._split(key)
        return around[0] + msgspec.json.encode(text) + around[1]

    def _split(self, key: Key) -> tuple[bytes, bytes]:
        # The last one: no id or name comes after the text.
        rendered = self._render(key, self._HOLE)
        before, _, after = rendered.rpartition(msgspec.json.encode(self._HOLE))
        return before, after


def usage_body(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens),
    )
