"""Microsoft's Phi."""

import json
import re
from typing import Any

import msgspec

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.styles.json_calls import PHI
from mlx_server.schemas.internal import ChatPrompt


class PhiAdapter(Adapter):
    """Templates take tools from the system message."""

    family = "phi"
    model_types = re.compile(r"^phi")
    names = re.compile(r"\bphi\b|\bphi-?\d")
    end_of_turn = ("<|end|>", "<|im_end|>", "<|endoftext|>")

    def _for_template(self, prompt: ChatPrompt) -> ChatPrompt:
        if self.style is None or self.style.name != PHI.name or not prompt.tools:
            return prompt
        messages = _with_tools(prompt.messages, prompt.tools)
        return msgspec.structs.replace(prompt, messages=messages, tools=None)


def _with_tools(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    functions = [tool.get("function", tool) for tool in tools]
    shown = {"tools": json.dumps(functions, ensure_ascii=False)}
    if messages and messages[0].get("role") == "system":
        return [messages[0] | shown, *messages[1:]]
    return [{"role": "system", "content": "", **shown}, *messages]
