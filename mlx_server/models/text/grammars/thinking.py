"""Blocks of thinking: their markers, whether a prompt leaves one open, and grammars around them."""

from enum import Enum
from typing import Any

from mlx_server.models.text.adapters.base import Reasoning
from mlx_server.models.text.grammars.json_schema import Unkept
from mlx_server.models.text.grammars.lark import Lark
from mlx_server.models.text.grammars.markers import Markers

KNOWN_MARKERS = (Reasoning("<think>", "</think>"), Reasoning("[THINK]", "[/THINK]"))
"""Beyond those that mlx-lm infers."""
GAP = r"/[ \t\r\n]{0,8}/"
"""What may stand between the end of the thinking and an answer that is bound."""
ANYTHING = "<[*]>*"
NO_TOKENS = "this model has no tokens that begin and end its thinking"


class Thinking(Enum):
    """What of a block of thinking is still to come at the end of a prompt."""

    OPEN = "the block has begun"
    POSSIBLE = "the model may begin one"
    DONE = "no block comes any more"


def find_reasoning(wrapper: Any, template: str) -> Reasoning | None:
    """The markers of a model, from its vocabulary (by mlx-lm's inference) or its template."""
    if wrapper.has_thinking:
        return Reasoning(wrapper.think_start, wrapper.think_end)
    vocab = wrapper.get_vocab()
    for known in KNOWN_MARKERS:
        if all(marker in vocab or marker in template for marker in (known.start, known.end)):
            return known
    return None


def thinking_after(opening: str, reasoning: Reasoning | None) -> Thinking:
    """What comes after `opening`, the part of a prompt that belongs to the answer."""
    if reasoning is None:
        return Thinking.DONE
    start, end = opening.rfind(reasoning.start), opening.rfind(reasoning.end)
    if start > end:
        return Thinking.OPEN
    return Thinking.POSSIBLE if end < 0 else Thinking.DONE


def bound_answer(
    lark: Lark,
    markers: Markers,
    reasoning: Reasoning,
    thinking: Thinking,
    answer: str,
    budget: int | None,
) -> str:
    """Thinking, of `budget` tokens at most, and then `answer`, a symbol of `lark`.

    Raises Unkept when the model has no token for the end of its thinking, which a budget needs.
    """
    if thinking is Thinking.DONE:
        return answer
    ended = lark.rule("thought", f"{_thought(lark, markers, reasoning, budget)} {GAP} {answer}")
    if thinking is Thinking.OPEN:
        return ended
    return lark.rule("thinking", f"{answer} | {markers.symbols(reasoning.start)} {ended}")


def free_answer(
    lark: Lark, markers: Markers, reasoning: Reasoning, thinking: Thinking, budget: int
) -> str:
    """Thinking of `budget` tokens at most and then anything, as a symbol of `lark`.

    Raises Unkept when the model has no tokens for its markers.
    """
    ended = lark.rule("thought", f"{_thought(lark, markers, reasoning, budget)} {ANYTHING}")
    if thinking is Thinking.OPEN:
        return ended
    first = next(iter(markers.found(reasoning.start)), None)
    if first is None:
        raise Unkept("", NO_TOKENS)
    unthought = f"(<[^{first}]> {ANYTHING})?"
    return lark.rule("thinking", f"{unthought} | {markers.symbols(reasoning.start)} {ended}")


def _thought(lark: Lark, markers: Markers, reasoning: Reasoning, budget: int | None) -> str:
    if budget is None:
        return markers.text_until(lark, reasoning.end)
    if not markers.found(reasoning.end):
        raise Unkept("", NO_TOKENS)
    return markers.tokens_until(lark, reasoning.end, budget)
