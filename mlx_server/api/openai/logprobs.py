"""Log-probabilities for chat completions and completions."""

import math
from collections.abc import Sequence

from mlx_server.schemas.internal import TokenLogprob
from mlx_server.schemas.openai.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from mlx_server.schemas.openai.completions import TextLogprobs

LOWEST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON lacks."""


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=entry.token,
                logprob=_finite(entry.logprob),
                bytes=list(entry.bytes),
                top_logprobs=[
                    TopLogprob(
                        token=other.token, logprob=_finite(other.logprob), bytes=list(other.bytes)
                    )
                    for other in entry.top
                ],
            )
            for entry in tokens
        ],
        refusal=None,
    )


def text_logprobs(tokens: Sequence[TokenLogprob], start: int) -> TextLogprobs:
    return TextLogprobs(
        tokens=[entry.token for entry in tokens],
        token_logprobs=[
            None if entry.logprob is None else _finite(entry.logprob) for entry in tokens
        ],
        top_logprobs=[_top_by_token(entry) for entry in tokens],
        text_offset=[start + entry.offset for entry in tokens],
    )


def joined(first: TextLogprobs, second: TextLogprobs) -> TextLogprobs:
    return TextLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _top_by_token(entry: TokenLogprob) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    # Tokens can share a text (such as halves of a character): keep the likelier.
    for other in entry.top:
        top.setdefault(other.token, _finite(other.logprob))
    top.setdefault(entry.token, _finite(entry.logprob))
    return top


def _finite(logprob: float | None) -> float:
    if logprob is None or math.isnan(logprob):
        return LOWEST_LOGPROB
    return max(logprob, LOWEST_LOGPROB)
