"""What the completion of a prompt is bound to: one grammar for thinking, calls and answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_server.errors import BadRequest
from mlx_server.models.text.adapters.base import Reasoning
from mlx_server.models.text.grammars.call_styles import (
    CallStyle,
    arguments_schema,
    calls_at_will,
    forced_calls,
    parameters_place,
)
from mlx_server.models.text.grammars.json_schema import Unkept, child_place
from mlx_server.models.text.grammars.lark import Grammars, Lark, constraint_grammar, json_grammar
from mlx_server.models.text.grammars.markers import Markers
from mlx_server.models.text.grammars.thinking import Thinking, bound_answer, free_answer
from mlx_server.schemas.internal import ChatPrompt, Constraint, ToolUse

Calls = Callable[[Lark, Markers, CallStyle, ToolUse], str]


class Binder:
    """Makes the grammars of one model, and checks that they can be kept."""

    def __init__(
        self, grammars: Grammars, reasoning: Reasoning | None, style: CallStyle | None
    ) -> None:
        self._grammars = grammars
        self._reasoning = reasoning
        self._style = style
        self._known_markers: Markers | None = None

    def text(self, constraint: Constraint) -> str:
        """The grammar of a bare text's completion. Raises BadRequest."""
        lark = Lark()
        return self._checked(lark.text(self._constrained(lark, constraint)), constraint, None)

    def chat(
        self, prompt: ChatPrompt, constraint: Constraint | None, thinking: Thinking
    ) -> str | None:
        """The grammar of an answer, None if anything may be said. Raises BadRequest."""
        lark = Lark()
        answer = self._answer(lark, prompt.use, constraint)
        start = self._with_thinking(lark, thinking, answer, prompt.thinking_budget)
        if start is None:
            return None
        return self._checked(lark.text(start), constraint, prompt.use)

    def _answer(self, lark: Lark, use: ToolUse | None, constraint: Constraint | None) -> str | None:
        """What follows any thinking, as a symbol; None for anything."""
        if use is not None and use.choice != "auto":
            return self._calls(lark, forced_calls, use)
        if constraint is not None:
            answer = self._constrained(lark, constraint)
            if use is None or self._style is None:
                return answer
            return lark.rule("either", f"{self._calls(lark, forced_calls, use)} | {answer}")
        if use is not None and any(tool["function"].get("strict") for tool in use.tools):
            return self._calls(lark, calls_at_will, use)
        return None

    def _with_thinking(
        self, lark: Lark, thinking: Thinking, answer: str | None, budget: int | None
    ) -> str | None:
        if self._reasoning is None or thinking is Thinking.DONE:
            return answer
        if answer is None and budget is None:
            return None
        with _refusing("thinking_budget"):
            if answer is not None:
                return bound_answer(
                    lark, self._markers(), self._reasoning, thinking, answer, budget
                )
            assert budget is not None
            return free_answer(lark, self._markers(), self._reasoning, thinking, budget)

    def _constrained(self, lark: Lark, constraint: Constraint) -> str:
        with _refusing(constraint.param):
            return lark.part(constraint_grammar(constraint))

    def _calls(self, lark: Lark, write: Calls, use: ToolUse) -> str:
        if self._style is None:
            raise BadRequest("This model has no chat template, so it cannot call tools.")
        with _refusing("tools"):
            return write(lark, self._markers(), self._style, use)

    def _markers(self) -> Markers:
        """Made when first needed, since the tokens must be read for it."""
        if self._known_markers is None:
            self._known_markers = Markers(self._grammars.special_tokens())
        return self._known_markers

    def _checked(self, grammar: str, constraint: Constraint | None, use: ToolUse | None) -> str:
        """The grammar, known to compile. Of one that does not, the part at fault is looked for."""
        with _refusing(constraint.param if constraint else "tools"):
            if constraint is not None:
                self._grammars.check_patterns(constraint_grammar(constraint))
            failure = self._grammars.check(grammar)
            if not failure:
                return grammar
            if constraint is not None:
                self._grammars.check_part(constraint_grammar(constraint))
        with _refusing("tools"):
            if use is not None:
                self._check_arguments(use)
        raise BadRequest(f"This request cannot be kept to: {failure}.")

    def _check_arguments(self, use: ToolUse) -> None:
        for index in range(len(use.tools)):
            try:
                self._grammars.check_part(json_grammar(arguments_schema(use, index)))
            except Unkept as error:
                place = child_place(parameters_place(index), error.place)
                raise Unkept(place, error.reason) from error


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Tell the client what of `param` cannot be kept."""
    try:
        yield
    except Unkept as error:
        place = f" at `{error.place}`" if error.place else ""
        raise BadRequest(
            f"`{param}` cannot be kept{place}: {error.reason}.", param=param
        ) from error
