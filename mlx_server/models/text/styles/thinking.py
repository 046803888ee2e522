"""Marks of thinking."""

from collections.abc import Container

from mlx_server.models.text.syntax import Reasoning

KNOWN = (
    Reasoning("<think>", "</think>"),
    Reasoning("<longcat_think>", "</longcat_think>"),
    Reasoning("<|think:start|>", "<|think:end|>"),
    Reasoning("<|channel>thought", "<channel|>"),
    Reasoning("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    Reasoning("[THINK]", "[/THINK]"),
    Reasoning("<seed:think>", "</seed:think>"),
    Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
    Reasoning("<|inner_prefix|>", "<|inner_suffix|>"),
    Reasoning("<|think|>", "<|end|><|begin|>assistant"),
    Reasoning("◁think▷", "◁/think▷"),
)
PARTS = {
    "<|channel>thought": ("<|channel>", "<channel|>"),
    "<|open|>think<|sep|>": ("<|open|>", "<|close|>", "<|sep|>"),
    "<|think|>": ("<|think|>", "<|end|>", "<|begin|>"),
}
"""The tokens of marks that are several, by the first mark."""


def find_reasoning(vocabulary: Container[str], template: str) -> Reasoning | None:
    for known in KNOWN:
        parts = PARTS.get(known.start, (known.start, known.end))
        if all(part in vocabulary for part in parts):
            return known
    for known in KNOWN:
        if known.start not in PARTS and known.start in template and known.end in template:
            return known
    return None
