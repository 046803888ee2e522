"""Ollama's requests as internal ones."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_server.api.sampling import left_to_model, with_greedy
from mlx_server.api.tools import check_names, function_tool
from mlx_server.engine.protocol import Sampling
from mlx_server.schemas.internal import (
    Caller,
    ChatPrompt,
    Constraint,
    InferenceRequest,
    Prompt,
    TextPrompt,
    ToolUse,
)
from mlx_server.schemas.ollama.chat import ChatRequest, GenerateRequest, Turn, TurnCall, TurnTool
from mlx_server.schemas.ollama.common import GenerationRequest, Options, Think

ANY_SEED = -1


def chat_inference(body: ChatRequest, caller: Caller) -> InferenceRequest:
    """Raises BadRequest."""
    return _inference(body, _conversation(body), caller)


def generate_inference(body: GenerateRequest, caller: Caller) -> InferenceRequest:
    if body.raw:
        return _inference(body, TextPrompt(body.prompt), caller)
    messages = [{"role": "user", "content": body.prompt}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    return _inference(
        body, ChatPrompt(messages, template_kwargs=_template_kwargs(body.think)), caller
    )


def _inference(body: GenerationRequest, prompt: Prompt, caller: Caller) -> InferenceRequest:
    options = body.options
    sampling = _sampling(options)
    return InferenceRequest(
        model=body.model,
        prompt=prompt,
        caller=caller,
        sampling=sampling,
        unasked=left_to_model(sampling, _asked(options)),
        seed=None if options.seed == ANY_SEED else options.seed,
        max_tokens=options.num_predict if options.num_predict > 0 else None,
        stop=_stops(options),
        logprobs=body.top_logprobs if body.logprobs else None,
        constraint=_constraint(body),
        keep_alive=body.keep_alive,
    )


def _sampling(options: Options) -> Sampling:
    return with_greedy(
        Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=max(0, options.top_k),
            min_p=options.min_p,
            repetition_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
        )
    )


def _asked(options: Options) -> set[str]:
    """By `Sampling`'s names."""
    renamed = {"repeat_penalty": "repetition_penalty"}
    return {renamed.get(name, name) for name in options.model_fields_set}


def _stops(options: Options) -> tuple[str, ...]:
    stops = [options.stop] if isinstance(options.stop, str) else options.stop
    return tuple(filter(None, stops))


def _constraint(body: GenerationRequest) -> Constraint | None:
    if body.format == "":
        return None
    if body.format == "json":
        return Constraint("json_object", None, "format")
    return Constraint("json_schema", body.format, "format")


def _template_kwargs(think: Think | None) -> dict[str, Any]:
    if think is None:
        return {}
    if think is False:
        return {"enable_thinking": False, "reasoning_effort": "none"}
    if think is True:
        return {"enable_thinking": True}
    return {"enable_thinking": True, "reasoning_effort": think}


# conversations


def _conversation(body: ChatRequest) -> ChatPrompt:
    """A final assistant message begins the answer."""
    messages = body.messages
    last = messages[-1]
    opens = last.role == "assistant" and not last.tool_calls
    if opens and not last.content:
        messages, opens = messages[:-1] or messages, False
    check_names(tool.function.name for tool in body.tools)
    tools = [_template_tool(tool) for tool in body.tools]
    return ChatPrompt(
        messages=list(_template_messages(messages)),
        tools=tools or None,
        template_kwargs=_template_kwargs(body.think),
        continue_final=opens,
        use=ToolUse(tools) if tools else None,
    )


def _template_tool(tool: TurnTool) -> dict[str, Any]:
    function = tool.function
    return function_tool(function.name, function.description, function.parameters)


def _template_messages(messages: Sequence[Turn]) -> Iterator[dict[str, Any]]:
    calls = _CallIds()
    for message in messages:
        written: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking:
            written["reasoning_content"] = message.thinking
        if message.tool_calls:
            written["tool_calls"] = calls.made(message.tool_calls)
        if message.role == "tool":
            written["tool_call_id"] = calls.answered(message)
            if message.tool_name:
                written["name"] = message.tool_name
        yield written


class _CallIds:
    """Ollama's results name the tool; templates want the id of the call, which clients drop."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[tuple[str, str]] = []
        """(tool, id) of calls without a result."""

    def made(self, calls: Sequence[TurnCall]) -> list[dict[str, Any]]:
        written = [self._call(call) for call in calls]
        self._open = [(one["function"]["name"], one["id"]) for one in written]
        return written

    def answered(self, result: Turn) -> str:
        if result.tool_call_id is not None:
            named = [one for one in self._open if one[1] == result.tool_call_id]
        else:
            named = [one for one in self._open if one[0] == result.tool_name] or self._open
        if named:
            self._open.remove(named[0])
            return named[0][1]
        return self._next() if result.tool_call_id is None else result.tool_call_id

    def _call(self, call: TurnCall) -> dict[str, Any]:
        function = {"name": call.function.name, "arguments": call.function.arguments}
        return {"id": call.id or self._next(), "type": "function", "function": function}

    def _next(self) -> str:
        self._count += 1
        return f"call{self._count:05}"
