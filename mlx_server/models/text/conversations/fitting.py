"""Fits conversations to a template: what it would drop it is given in another form, what it refuses
is repaired.
"""

from functools import partial

import msgspec

from mlx_server.errors import BadRequest
from mlx_server.models.text.conversations.forms import Message, Messages
from mlx_server.models.text.conversations.repairs import (
    REPAIRS,
    Repair,
    fold_system,
    place_systems,
    repaired,
    split_calls,
    tell_stray_results,
)
from mlx_server.models.text.conversations.traits import Traits
from mlx_server.models.text.styles.json_calls import GENERIC
from mlx_server.models.text.syntax import CallStyle
from mlx_server.models.text.template import ChatTemplate
from mlx_server.models.text.tool_prompts import calls_message, describe_tools, plain_messages
from mlx_server.schemas.internal import ChatPrompt

MOST_TRIES = 24
LEAST_TRIES = 4
TRIED_MESSAGES = 8_000
"""Of long conversations fewer repairs are tried."""


class Fitting:
    """Thread-safe. In `style` calls are told that the template does not show."""

    def __init__(self, template: ChatTemplate, style: CallStyle | None) -> None:
        self.plain, self.tooled = (Traits(template, with_tools) for with_tools in (False, True))
        self._template = template
        self._style = style
        self._repairs: tuple[Repair, ...] = (*REPAIRS, partial(plain_messages, style=style))

    def render(self, prompt: ChatPrompt) -> tuple[ChatPrompt, str]:
        """What the template is given, and what it makes of it. Raises BadRequest for what it
        refuses however it is put.
        """
        shown = self._shown(prompt)
        try:
            return shown, self._rendered(shown)
        except BadRequest as refused:
            tries = min(MOST_TRIES, max(LEAST_TRIES, TRIED_MESSAGES // (len(shown.messages) or 1)))
            for messages in repaired(shown.messages, self._repairs, tries):
                other = msgspec.structs.replace(shown, messages=messages)
                try:
                    return other, self._rendered(other)
                except BadRequest:
                    continue
            raise refused

    def _rendered(self, prompt: ChatPrompt) -> str:
        return self._template.render(prompt, add_generation_prompt=not prompt.continue_final)

    def _shown(self, prompt: ChatPrompt) -> ChatPrompt:
        tools = prompt.tools if self._style is not GENERIC and self.tooled.shows_tools else None
        traits = self.tooled if tools else self.plain
        messages = self._with_calls(traits, prompt.messages)
        if prompt.tools and not tools:
            messages = describe_tools(messages, prompt.tools, traits.shows_system, self._style)
        if _have(messages, "reasoning_content"):
            messages = _with_thoughts(traits, messages)
        messages = _with_systems(traits, messages)
        return msgspec.structs.replace(prompt, messages=messages, tools=tools)

    def _with_calls(self, traits: Traits, messages: Messages) -> Messages:
        if not _have(messages, "tool_calls") and not _have(messages, "tool_call_id"):
            return messages
        if self._style is GENERIC:
            return plain_messages(messages, self._style)
        if traits.call_form is None:
            if not traits.shows_results:
                return plain_messages(messages, self._style)
            return [calls_message(message, self._style) for message in messages]
        if traits.drops_parallel_calls:
            messages = split_calls(messages)
        if traits.drops_stray_results:
            messages = tell_stray_results(messages)
        return traits.call_form.given(_with_plans(traits, messages))


def _with_plans(traits: Traits, messages: Messages) -> Messages:
    spoken = any(one.get("tool_calls") and one.get("content") for one in messages)
    if not spoken or not traits.plans_calls:
        return messages
    return [_planned(one) if one.get("tool_calls") else one for one in messages]


def _planned(message: Message) -> Message:
    said = filter(None, (message.get("reasoning_content"), message.get("content")))
    return {**message, "tool_plan": "\n\n".join(said)}


def _with_thoughts(traits: Traits, messages: Messages) -> Messages:
    key = traits.thought_key or "reasoning_content"
    if key == "reasoning_content":
        return messages
    return [
        {key: message["reasoning_content"], **message}
        if message.get("reasoning_content")
        else message
        for message in messages
    ]


def _with_systems(traits: Traits, messages: Messages) -> Messages:
    systems = [index for index, one in enumerate(messages) if one.get("role") == "system"]
    if any(systems) and traits.misplaces_late_systems:
        messages = place_systems(messages)
    asked = not messages or messages[-1].get("role") == "user"
    if systems and not (traits.shows_system and (asked or not traits.drops_system_unless_asked)):
        messages = fold_system(messages)
    return messages


def _have(messages: list[Message], key: str) -> bool:
    return any(message.get(key) for message in messages)
