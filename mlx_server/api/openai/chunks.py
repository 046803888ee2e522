"""What OpenAI's answers and chunks share."""

import time
from dataclasses import dataclass
from typing import Self
from uuid import uuid4

from mlx_server import __version__
from mlx_server.api.generation import Accepted
from mlx_server.schemas.internal import Usage
from mlx_server.schemas.openai.common import (
    CompletionTokensDetails,
    CompletionUsage,
    PromptTokensDetails,
)

SYSTEM_FINGERPRINT = f"mlx-server-{__version__}"


@dataclass(frozen=True, slots=True)
class Header:
    id: str
    created: int
    model: str

    @classmethod
    def fresh(cls, id_prefix: str, accepted: Accepted) -> Self:
        return cls(f"{id_prefix}-{uuid4().hex}", int(time.time()), accepted.model)


def usage_body(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=usage.reasoning_tokens,
            accepted_prediction_tokens=usage.accepted_guesses,
            rejected_prediction_tokens=usage.rejected_guesses,
        ),
    )
