"""Microsoft's Phi."""

import json
import re
from typing import Any

from mlx_server.models.text.adapters.generic import GenericAdapter
from mlx_server.models.text.adapters.tool_prompts import arguments_text
from mlx_server.models.text.grammars.call_styles import PHI
from mlx_server.schemas.internal import ChatPrompt


class PhiAdapter(GenericAdapter):
    """Ends a turn with `<|end|>`, which the larger Phi-4 spells `<|im_end|>`.

    The templates that know tools find them in the system message, and know no calls.
    """

    family = "phi"
    model_types = re.compile(r"^phi")
    names = re.compile(r"\bphi\b|\bphi-?\d")
    end_of_turn = ("<|end|>", "<|im_end|>", "<|endoftext|>")

    def _messages(self, prompt: ChatPrompt) -> list[dict[str, Any]]:
        if self._style is not PHI:
            return super()._messages(prompt)
        messages = [_with_plain_calls(message) for message in prompt.messages]
        if not prompt.tools:
            return messages
        functions = [tool.get("function", tool) for tool in prompt.tools]
        shown = {"tools": json.dumps(functions, ensure_ascii=False)}
        if messages and messages[0].get("role") == "system":
            return [messages[0] | shown, *messages[1:]]
        return [{"role": "system", "content": "", **shown}, *messages]


def _with_plain_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = (call.get("function") or {} for call in calls)
    objects = ", ".join(
        f'{{"name": {json.dumps(one.get("name"))}, "arguments": {arguments_text(one)}}}'
        for one in functions
    )
    text = f"{message.get('content') or ''}{PHI.syntax.start}[{objects}]{PHI.syntax.end}"
    return {"role": "assistant", "content": text}
