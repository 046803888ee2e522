"""What protocols share of sampling parameters."""

from collections.abc import Set

import msgspec

from mlx_server.engine.protocol import Sampling

LEAST_TEMPERATURE = 2.0**-126
"""The smallest normal float32; devices may flush smaller ones to 0."""

MODELS_OWN = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
"""What models recommend."""


def with_greedy(sampling: Sampling) -> Sampling:
    """A `top_p` of 0, or a temperature that is 0 in float32, means greedy."""
    if sampling.top_p > 0 and sampling.temperature >= LEAST_TEMPERATURE:
        return sampling
    return msgspec.structs.replace(sampling, temperature=0.0, top_p=1.0)


def left_to_model(sampling: Sampling, asked: Set[str]) -> frozenset[str]:
    """The settings of `sampling` that the request did not ask for."""
    greedy = {"temperature", "top_p"} if sampling.temperature == 0 else set()
    return MODELS_OWN - asked - greedy
