"""What a template shows and what it drops, found by rendering small conversations."""

from functools import cached_property
from typing import Any

from mlx_server.errors import BadRequest
from mlx_server.models.text.conversations.forms import CallForm, Messages, call_forms
from mlx_server.models.text.template import ChatTemplate
from mlx_server.schemas.internal import ChatPrompt

ASKED, TOLD = "questionprobe", "answerprobe"
SYSTEM, LATER = "systemprobe", "laterprobe"
NAME, VALUE, RESULT, THOUGHT = "nameprobe", "valueprobe", "resultprobe", "thoughtprobe"
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_plan")


def _said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}}
    function = {"name": name, "description": "Looks.", "parameters": parameters}
    return {"type": "function", "function": function}


def _call(number: int) -> dict[str, Any]:
    function = {"name": f"{NAME}{number}", "arguments": {"key": f"{VALUE}{number}"}}
    return {"id": f"call_{number:024}", "type": "function", "function": function}


def _result(number: int) -> dict[str, Any]:
    return _said("tool", f"{RESULT}{number}", tool_call_id=f"call_{number:024}")


QUESTION, ANSWER = _said("user", ASKED), _said("assistant", TOLD)
FIRST, LATE = _said("system", SYSTEM), _said("system", LATER)
CALL = _said("assistant", "", tool_calls=[_call(1)])
CALLS = _said("assistant", "", tool_calls=[_call(1), _call(2)])
TOOLS = [_tool("otherprobe")]
LATE_SYSTEMS: tuple[Messages, ...] = (
    [FIRST, LATE, QUESTION],
    [QUESTION, LATE],
    [FIRST, QUESTION, ANSWER, LATE, QUESTION],
    [FIRST, QUESTION, LATE, ANSWER, QUESTION],
)


class Traits:
    """Thread-safe. Each is found when it is first asked for. With tools a template may behave
    differently, or be another.
    """

    def __init__(self, template: ChatTemplate, with_tools: bool) -> None:
        self._template = template
        self._tools = TOOLS if with_tools else None

    @cached_property
    def shows_system(self) -> bool:
        """False if the template refuses or drops system messages."""
        return self._shows([FIRST, QUESTION], [SYSTEM, ASKED])

    @cached_property
    def drops_system_unless_asked(self) -> bool:
        """Where the last message is not the user's."""
        form = self.call_form or CallForm()
        called = form.given([FIRST, QUESTION, CALL, _result(1)])
        return any(
            self._drops(one, [SYSTEM]) for one in ([FIRST], [FIRST, QUESTION, ANSWER], called)
        )

    @cached_property
    def misplaces_late_systems(self) -> bool:
        """Drops them, or puts them elsewhere than they were said."""
        return any(self._misplaces(messages) for messages in LATE_SYSTEMS)

    @cached_property
    def shows_tools(self) -> bool:
        return self._shows([QUESTION], ["otherprobe"])

    @cached_property
    def call_form(self) -> CallForm | None:
        """None if the template shows calls in no form."""
        words = [f"{NAME}1", f"{VALUE}1", f"{RESULT}1"]
        messages = [QUESTION, CALL, _result(1)]
        return next((one for one in call_forms() if self._shows(one.given(messages), words)), None)

    @cached_property
    def shows_results(self) -> bool:
        """Of calls that are told in words."""
        return self._shows([QUESTION, ANSWER, _result(1)], [TOLD, f"{RESULT}1"])

    @cached_property
    def drops_stray_results(self) -> bool:
        return self._drops([QUESTION, _result(1), QUESTION], [f"{RESULT}1"])

    @cached_property
    def drops_parallel_calls(self) -> bool:
        form = self.call_form or CallForm()
        messages = form.given([QUESTION, CALLS, _result(1), _result(2)])
        return self._drops(messages, [f"{VALUE}1", f"{VALUE}2", f"{RESULT}2"])

    @cached_property
    def thought_key(self) -> str | None:
        """Where thoughts are shown in an answer that calls, or in any; None: nowhere."""
        form = self.call_form or CallForm()
        for key in THOUGHT_KEYS:
            thought = {key: THOUGHT}
            for answer in (CALL | thought, ANSWER | thought):
                messages = [QUESTION, answer, *([_result(1)] if answer.get("tool_calls") else [])]
                if self._shows(form.given(messages), [THOUGHT]):
                    return key
        return None

    @cached_property
    def plans_calls(self) -> bool:
        """Text in front of calls is shown as their plan alone."""
        form = self.call_form or CallForm()

        def shown(**more: str) -> bool:
            call = {**CALL, "content": TOLD, **more}
            return self._shows(form.given([QUESTION, call, _result(1)]), [TOLD])

        return not shown() and shown(tool_plan=TOLD)

    def _shows(self, messages: Messages, words: list[str]) -> bool:
        text = self._made(messages)
        return text is not None and all(word in text for word in words)

    def _drops(self, messages: Messages, words: list[str]) -> bool:
        """False if it refuses them: that will be seen."""
        text = self._made(messages)
        return text is not None and not all(word in text for word in words)

    def _misplaces(self, messages: Messages) -> bool:
        """False if it refuses them: that will be seen."""
        text = self._made(messages)
        if text is None:
            return False
        position = 0
        for message in messages:
            if message is FIRST and not self.shows_system:
                continue
            position = text.find(message["content"], position) + 1
            if position == 0:
                return True
        return False

    def _made(self, messages: Messages) -> str | None:
        prompt = ChatPrompt(messages, self._tools)
        try:
            return self._template.render(prompt, add_generation_prompt=True)
        except BadRequest:
            return None
