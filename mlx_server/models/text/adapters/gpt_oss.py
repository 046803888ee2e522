"""OpenAI's gpt-oss, which answers in channels."""

import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import msgspec

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.channels import ANALYSIS, MARKS
from mlx_server.models.text.grammars.builder import GrammarBuilder
from mlx_server.models.text.grammars.channels import ChannelGrammarBuilder
from mlx_server.models.text.syntax import CallStyle, Reasoning, Syntax, Thinking
from mlx_server.models.text.tool_prompts import plain_messages
from mlx_server.schemas.internal import ChatPrompt

EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""The model knows low, medium and high."""
QUOTED_MARK = re.compile(r"<\|(?=channel\|>(?:analysis|final)<\|message\|>)")
"""The template refuses these in what the assistant said."""
ZERO_WIDTH_SPACE = "\u200b"


class GptOssAdapter(Adapter):
    """Its template calls thinking `thinking`, takes one call a message with the result right behind
    it, and needs tools to be described.
    """

    family = "gpt-oss"
    model_types = re.compile(r"gpt_oss")
    names = re.compile(r"gpt-?oss")
    end_of_turn = ("<|return|>", "<|call|>", "<|endoftext|>")

    def _for_template(self, prompt: ChatPrompt) -> ChatPrompt:
        effort = prompt.template_kwargs.get("reasoning_effort")
        known = {"reasoning_effort": EFFORTS[str(effort)]} if str(effort) in EFFORTS else {}
        return msgspec.structs.replace(
            prompt,
            messages=list(_shown_messages(prompt.messages)),
            tools=[_shown_tool(tool) for tool in prompt.tools or ()] or None,
            template_kwargs=prompt.template_kwargs | known,
        )

    def _thinking_after(self, prompt: ChatPrompt, rendered: str) -> Thinking:
        if prompt.continue_final:
            return Thinking.DONE
        opening = self.template.generation_prompt(prompt, rendered)
        _, start, message = opening.rpartition("<|start|>")
        header, text_begins, _ = message.partition("<|message|>")
        if start and not text_begins:
            return Thinking.POSSIBLE
        return Thinking.OPEN if ANALYSIS in header else Thinking.DONE

    def _find_style(self, wrapper: Any) -> CallStyle | None:
        return None

    def _find_syntax(self, reasoning: Reasoning | None) -> Syntax:
        ids = self.tokenizer.special_tokens()
        visible = {ids[token]: str(mark) for token, mark in MARKS.items() if token in ids}
        return Syntax(channels=True, visible=visible)

    def _find_grammars(self, reasoning: Reasoning | None) -> GrammarBuilder:
        return ChannelGrammarBuilder(self._checker, None, None)


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """With texts wherever the template adds texts up."""
    function = {"description": ""} | tool["function"]
    parameters = function.get("parameters") or {}
    if isinstance(properties := parameters.get("properties"), dict):
        shown = {name: _shown_property(one) for name, one in properties.items()}
        function["parameters"] = parameters | {"properties": shown}
    return tool | {"function": function}


def _shown_property(schema: Any) -> Any:
    if not isinstance(schema, dict) or isinstance(schema.get("default", ""), str):
        return schema
    if not schema.get("enum") and not schema.get("oneOf"):
        return schema
    return schema | {"default": json.dumps(schema["default"], ensure_ascii=False)}


def _shown_messages(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rest = deque(map(_shown_message, messages))
    while rest:
        message = rest.popleft()
        if "tool_calls" in message:
            results = list(takewhile(lambda one: one["role"] == "tool", rest))
            for _ in results:
                rest.popleft()
            yield from _calls_and_results(message, results)
        else:
            # The template refuses results of no call.
            yield from plain_messages([message])


def _shown_message(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    thinking = message.get("reasoning_content") or ""
    content = message.get("content") or ""
    if "tool_calls" in message:
        # Before a call the template takes either.
        thinking, content = "\n\n".join(filter(None, [thinking, content])), ""
    shown = {name: value for name, value in message.items() if name != "reasoning_content"}
    shown["content"] = _unquoted(content)
    return shown | {"thinking": _unquoted(thinking)} if thinking else shown


def _unquoted(text: str) -> str:
    return QUOTED_MARK.sub(f"<{ZERO_WIDTH_SPACE}|", text)


def _calls_and_results(
    message: dict[str, Any], results: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each call with the result of its id, or else the next one of no call's id."""
    calls = message["tool_calls"]
    ids = {call.get("id") for call in calls}
    left = list(results)
    for call in calls:
        yield message | {"tool_calls": [call]}
        message = {name: value for name, value in message.items() if name != "thinking"}
        own = [one for one in left if one.get("tool_call_id") == call.get("id")]
        strays = [one for one in left if one.get("tool_call_id") not in ids]
        mine = left if call is calls[-1] else [*own, *strays][:1]
        yield from mine
        left = [one for one in left if all(one is not told for told in mine)]
