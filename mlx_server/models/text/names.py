"""Stand-ins for the names of tools that a syntax of calls cannot spell."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from mlx_server.models.text.syntax import CallSyntax
from mlx_server.schemas.internal import ChatPrompt, Prompt, ToolUse

UNSPEAKABLE = re.compile(r"^(?=[0-9])|[^A-Za-z0-9_]")


@dataclass(frozen=True, slots=True)
class Spelled:
    """`names` are the tools' own, by their stand-ins."""

    prompt: Prompt
    names: Mapping[str, str] = field(default_factory=dict)


def spell(prompt: Prompt, syntax: CallSyntax | None) -> Spelled:
    """The same conversation and tools have the same stand-ins, so that prompts stay cached."""
    if not isinstance(prompt, ChatPrompt) or syntax is None:
        return Spelled(prompt)
    names = list(dict.fromkeys(_names(prompt)))
    odd = [name for name in names if not re.fullmatch(syntax.spelling, name)]
    if not odd:
        return Spelled(prompt)
    taken, stand_ins = set(names), dict[str, str]()
    for name in odd:
        stand_ins[name] = _free(UNSPEAKABLE.sub("_", name), taken)
        taken.add(stand_ins[name])
    return Spelled(_renamed(prompt, stand_ins), {new: old for old, new in stand_ins.items()})


def _names(prompt: ChatPrompt) -> Iterator[str]:
    """Of tools, and of calls and results that may be of tools no longer there."""
    for tool in prompt.tools or ():
        yield tool["function"]["name"]
    for message in prompt.messages:
        for call in message.get("tool_calls") or ():
            yield call["function"]["name"]
        if message["role"] == "tool" and message.get("name"):
            yield message["name"]


def _free(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(one for one in (name, *numbered) if one not in taken)


def _renamed(prompt: ChatPrompt, stand_ins: Mapping[str, str]) -> ChatPrompt:
    def named(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "name": stand_ins.get(one["name"], one["name"])}

    def functions(owners: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**owner, "function": named(owner["function"])} for owner in owners]

    def said(message: dict[str, Any]) -> dict[str, Any]:
        if message.get("tool_calls"):
            return {**message, "tool_calls": functions(message["tool_calls"])}
        result = message["role"] == "tool" and message.get("name")
        return named(message) if result else message

    def used(use: ToolUse) -> ToolUse:
        name = use.name and stand_ins.get(use.name, use.name)
        return replace(use, tools=functions(use.tools), name=name)

    return msgspec.structs.replace(
        prompt,
        messages=[said(message) for message in prompt.messages],
        tools=prompt.tools and functions(prompt.tools),
        use=prompt.use and used(prompt.use),
    )
