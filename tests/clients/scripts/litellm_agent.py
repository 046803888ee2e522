"""MODEL URL openai|anthropic PROMPT: LiteLLM's streams, put together by LiteLLM."""

import json
import sys

import litellm
from tools import TOOLS

name, url, provider, prompt = sys.argv[1:]
base = f"{url}/v1" if provider == "openai" else url
text, words = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
PARAMETERS = {
    "read_file": {"path": text},
    "edit_file": {"path": text, "old": text, "new": text},
    "run_command": {"command": words, "output": text},
}
functions = {tool.__name__: tool for tool in TOOLS}
tools = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": functions[name].__doc__,
            "parameters": {"type": "object", "properties": kinds, "required": list(kinds)},
        },
    }
    for name, kinds in PARAMETERS.items()
]
messages = [{"role": "user", "content": prompt}]
for _turn in range(10):
    stream = litellm.completion(
        model=f"{provider}/{name}",
        api_base=base,
        api_key="unused",
        messages=messages,
        tools=tools,
        stream=True,
        stream_options={"include_usage": True},
    )
    whole = litellm.stream_chunk_builder(list(stream), messages=messages)
    assert whole.usage.prompt_tokens > 0
    said = whole.choices[0].message
    messages.append(said.model_dump(exclude_none=True))
    if not said.tool_calls:
        print(said.content)
        break
    for call in said.tool_calls:
        result = functions[call.function.name](**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
