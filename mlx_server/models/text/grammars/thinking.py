"""Grammars of thinking before an answer."""

from mlx_server.models.text.grammars.json_schema import Unkept
from mlx_server.models.text.grammars.lark import Lark
from mlx_server.models.text.syntax import Reasoning, Thinking

GAP = r"/[ \t\r\n]{0,8}/"
ANY_TOKENS = "<[*]>*"
NO_TOKENS = "this model has no tokens that begin and end its thinking"


def bound_answer(
    lark: Lark, reasoning: Reasoning, thinking: Thinking, answer: str, budget: int | None
) -> str:
    """At most `budget` tokens of thinking, then `answer`. Raises Unkept for a budget if the end
    marker is no token.
    """
    ended = lark.rule("thought", f"{_thought(lark, reasoning, budget)} {GAP} {answer}")
    if thinking is Thinking.OPEN:
        return ended
    return lark.rule("thinking", f"{answer} | {lark.exactly(reasoning.start)} {ended}")


def free_answer(lark: Lark, reasoning: Reasoning, thinking: Thinking, budget: int) -> str:
    """At most `budget` tokens of thinking, then anything. Raises Unkept if the markers are no
    tokens.
    """
    ended = lark.rule("thought", f"{_thought(lark, reasoning, budget)} {ANY_TOKENS}")
    if thinking is Thinking.OPEN:
        return ended
    first = lark.special_token(reasoning.start)
    if first is None:
        raise Unkept("", NO_TOKENS)
    unthought = f"(<[^{first}]> {ANY_TOKENS})?"
    return lark.rule("thinking", f"{unthought} | {lark.exactly(reasoning.start)} {ended}")


def _thought(lark: Lark, reasoning: Reasoning, budget: int | None) -> str:
    if budget is None:
        return lark.text_until(reasoning.end)
    if lark.special_token(reasoning.end) is None:
        raise Unkept("", NO_TOKENS)
    return lark.tokens_until(reasoning.end, budget)
