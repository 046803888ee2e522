"""Requests to OpenAI's routes, in process."""

from typing import Any

from mlx_server.api.openai import chat, completions
from mlx_server.schemas.internal import Caller, ChatPrompt, InferenceRequest
from mlx_server.schemas.openai.chat import ChatCompletionRequest
from mlx_server.schemas.openai.completions import CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
CALLER = Caller("req_1")
MAX_CHOICES = 16

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO} | fields


def chat_request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(chat_body(**fields))


def completion_request(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "Hello"} | fields)


def translated(**fields: Any) -> InferenceRequest:
    """A chat completion's request."""
    return chat.to_inference(chat_request(**fields), CALLER, MAX_CHOICES)


def completions_translated(**fields: Any) -> list[InferenceRequest]:
    return completions.to_inference(completion_request(**fields), CALLER, MAX_CHOICES)


def chat_prompt(**fields: Any) -> ChatPrompt:
    prompt = translated(**fields).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt
