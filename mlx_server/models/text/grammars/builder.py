"""A completion's grammar: thinking, tool calls and answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_server.errors import BadRequest
from mlx_server.models.text.grammars.calls import (
    arguments_schema,
    forced_calls,
    optional_calls,
    parameters_place,
)
from mlx_server.models.text.grammars.checker import GrammarChecker
from mlx_server.models.text.grammars.json_schema import Unkept, child_place
from mlx_server.models.text.grammars.lark import Lark
from mlx_server.models.text.grammars.parts import constraint_grammar, json_grammar
from mlx_server.models.text.grammars.thinking import bound_answer, free_answer
from mlx_server.models.text.syntax import CallStyle, Reasoning, Thinking
from mlx_server.schemas.internal import ChatPrompt, Constraint, ToolUse

WriteCalls = Callable[[Lark, CallStyle, ToolUse], str]


class GrammarBuilder:
    def __init__(
        self, checker: GrammarChecker, reasoning: Reasoning | None, style: CallStyle | None
    ) -> None:
        self._checker = checker
        self._reasoning = reasoning
        self._style = style

    def completion(self, constraint: Constraint) -> str:
        """Raises BadRequest."""
        lark = self._lark(constraint.param)
        return self._checked(lark.source(constrained_answer(lark, constraint)), constraint, None)

    def chat(
        self, prompt: ChatPrompt, constraint: Constraint | None, thinking: Thinking
    ) -> str | None:
        """None if unconstrained. Raises BadRequest."""
        use = prompt.use
        budget = None if thinking is Thinking.DONE else prompt.thinking_budget
        calls_bound = use is not None and (use.choice != "auto" or _has_strict_tools(use))
        if constraint is None and not calls_bound and budget is None:
            return None
        param = constraint.param if constraint else "tools" if calls_bound else "thinking_budget"
        lark = self._lark(param)
        start = self._start(lark, use, constraint, thinking, budget)
        return self._checked(lark.source(start), constraint, use)

    def _start(
        self,
        lark: Lark,
        use: ToolUse | None,
        constraint: Constraint | None,
        thinking: Thinking,
        budget: int | None,
    ) -> str:
        return self._with_thinking(lark, thinking, self._answer(lark, use, constraint), budget)

    def _answer(self, lark: Lark, use: ToolUse | None, constraint: Constraint | None) -> str | None:
        if use is not None and use.choice != "auto":
            return self._calls(lark, forced_calls, use)
        if constraint is not None:
            answer = constrained_answer(lark, constraint)
            if use is None:
                return answer
            return lark.rule("either", f"{self._calls(lark, forced_calls, use)} | {answer}")
        if use is not None and _has_strict_tools(use):
            return self._calls(lark, optional_calls, use)
        return None

    def _with_thinking(
        self, lark: Lark, thinking: Thinking, answer: str | None, budget: int | None
    ) -> str:
        if thinking is Thinking.DONE:
            assert answer is not None
            return answer
        assert self._reasoning is not None
        with refusing("thinking_budget"):
            if answer is not None:
                return bound_answer(lark, self._reasoning, thinking, answer, budget)
            assert budget is not None
            return free_answer(lark, self._reasoning, thinking, budget)

    def _calls(self, lark: Lark, write: WriteCalls, use: ToolUse) -> str:
        assert self._style is not None  # without one there is no chat template
        with refusing("tools"):
            return write(lark, self._style, use)

    def _lark(self, param: str) -> Lark:
        with refusing(param):
            return Lark(self._checker.special_tokens())

    def _checked(self, grammar: str, constraint: Constraint | None, use: ToolUse | None) -> str:
        with refusing(constraint.param if constraint else "tools"):
            if constraint is not None:
                self._checker.check_patterns(constraint_grammar(constraint))
            error = self._checker.error_in(grammar)
            if not error:
                return grammar
            if constraint is not None:
                self._checker.check(constraint_grammar(constraint))
        with refusing("tools"):
            if use is not None:
                self._check_arguments(use)
        raise BadRequest(f"This request cannot be kept to: {error}.")

    def _check_arguments(self, use: ToolUse) -> None:
        for index in range(len(use.tools)):
            try:
                self._checker.check(json_grammar(arguments_schema(use, index)))
            except Unkept as error:
                place = child_place(parameters_place(index), error.place)
                raise Unkept(place, error.reason) from error


def _has_strict_tools(use: ToolUse) -> bool:
    return any(tool["function"].get("strict") for tool in use.tools)


def constrained_answer(lark: Lark, constraint: Constraint) -> str:
    with refusing(constraint.param):
        return lark.part(constraint_grammar(constraint))


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Raises BadRequest for what is Unkept."""
    try:
        yield
    except Unkept as error:
        place = f" at `{error.place}`" if error.place else ""
        raise BadRequest(
            f"`{param}` cannot be kept{place}: {error.reason}.", param=param
        ) from error
