"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.chunk_template import ChunkTemplate
from mlx_server.api.generation import AnswerFormats, Generator
from mlx_server.api.http.dependencies import CallerDep, MetricsDep, ServiceDep, SettingsDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.openai.chunks import SYSTEM_FINGERPRINT, Header, usage_body
from mlx_server.api.openai.custom_tools import InputReader
from mlx_server.api.openai.logprobs import chat_logprobs
from mlx_server.api.openai.parameters import (
    check_choices,
    constraint,
    sampling,
    seed,
    stop_strings,
    unasked,
)
from mlx_server.api.openai.prompts import chat_prompt, custom_names, has_tools
from mlx_server.api.openai.wire import END_MARK, documented
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import (
    Caller,
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.schemas.openai.chat import (
    AssistantMessage,
    CallDelta,
    CalledCustomTool,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    CustomDelta,
    FunctionDelta,
    MessageToolCall,
)
from mlx_server.schemas.openai.common import ErrorBody

router = APIRouter(prefix="/v1", route_class=JsonRoute, strict_content_type=False)


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=documented(400, 401, 403, 404, 413, 429, 500, 503, 504)
    | event_stream([ChatCompletionChunk, ErrorBody], marks=[END_MARK]),
)
async def create_chat_completion(
    body: ChatCompletionRequest,
    caller: CallerDep,
    service: ServiceDep,
    settings: SettingsDep,
    metrics: MetricsDep,
) -> Response:
    """Answer a conversation."""
    request = to_inference(body, caller, settings.max_choices)
    formats = AnswerFormats(
        answer=lambda accepted: ChatAnswer(Header.fresh("chatcmpl", accepted), body),
        stream=lambda accepted: ChatStream(Header.fresh("chatcmpl", accepted), body),
    )
    generator = Generator(service, metrics, [request], formats)
    return generator.stream() if body.stream else generator.answer()


def to_inference(body: ChatCompletionRequest, caller: Caller, max_choices: int) -> InferenceRequest:
    check_choices(body.n, max_choices)
    prompt = chat_prompt(body.messages, body)
    bound = constraint(body)
    limit = body.max_completion_tokens or body.max_tokens
    must_call = prompt.use is not None and prompt.use.choice != "auto"
    if must_call and body.ignore_eos:
        raise BadRequest("`ignore_eos` would go on past the call.", param="ignore_eos")
    return InferenceRequest(
        model=body.model,
        prompt=prompt,
        caller=caller,
        sampling=sampling(body),
        unasked=unasked(body),
        seed=seed(body),
        max_tokens=limit if limit > 0 else None,
        stop=stop_strings(body),
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        # A constraint binds text; an answer that must call has none.
        constraint=None if must_call else bound,
        ignore_eos=body.ignore_eos,
        priority=body.priority,
        keep_alive=body.keep_alive,
        prediction=body.prediction.text if body.prediction else "",
    )


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def function(self) -> CalledFunction:
        return CalledFunction(name=self.name, arguments="".join(self.arguments))

    def body(self, customs: frozenset[str]) -> MessageToolCall:
        if self.name not in customs:
            return MessageToolCall(id=self.id, type="function", function=self.function())
        reader = InputReader()
        told = "".join([*map(reader.push, self.arguments), reader.finish()])
        custom = CalledCustomTool(name=self.name, input=told)
        return MessageToolCall(id=self.id, type="custom", custom=custom)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = ""

    def feed(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.text.append(event.text)
                self.logprobs.extend(event.logprobs)
            case ReasoningDelta():
                self.reasoning.append(event.text)
            case ToolCallStart():
                self.calls.append(_Call(event.id, event.name))
            case ToolCallDelta():
                self.calls[event.call].arguments.append(event.arguments)
            case Finished():
                self.reason = event.reason


class ChatAnswer:
    def __init__(self, header: Header, body: ChatCompletionRequest) -> None:
        self._header = header
        self._with_logprobs = body.logprobs
        self._old_calls = bool(body.functions)
        self._customs = custom_names(body)
        self._choices = [_Choice() for _ in range(body.n)]

    def feed(self, prompt: int, event: Event) -> None:
        if not isinstance(event, PromptScored):
            self._choices[event.choice].feed(event)

    def body(self, usage: Usage) -> bytes:
        return ChatCompletion(
            id=self._header.id,
            object="chat.completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=[self._choice(index, one) for index, one in enumerate(self._choices)],
            usage=usage_body(usage),
        ).to_json()

    def _choice(self, index: int, choice: _Choice) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=self._message(choice),
            logprobs=chat_logprobs(choice.logprobs) if self._with_logprobs else None,
            finish_reason=_reason(choice.reason, self._old_calls),
        )

    def _message(self, choice: _Choice) -> AssistantMessage:
        content = "".join(choice.text)
        message = AssistantMessage(
            role="assistant",
            content=None if choice.calls and not content else content,
            refusal=None,
        )
        if choice.reasoning:
            message.reasoning_content = "".join(choice.reasoning)
        if choice.calls and self._old_calls:
            message.function_call = choice.calls[0].function()
        elif choice.calls:
            message.tool_calls = [call.body(self._customs) for call in choice.calls]
        return message


class ChatStream:
    def __init__(self, header: Header, body: ChatCompletionRequest) -> None:
        self._header = header
        self._choices = body.n
        self._with_logprobs = body.logprobs
        self._with_usage = body.stream_options.include_usage
        self._old_calls = bool(body.functions)
        self._customs = custom_names(body)
        self._inputs: dict[tuple[int, int], InputReader] = {}
        # OpenAI: null content, not "", for an answer of calls only.
        self._opening = ChatDelta(role="assistant", content=None if has_tools(body) else "")
        self._text: ChunkTemplate[int] = ChunkTemplate(
            lambda index, text: self._delta(index, ChatDelta(content=text))
        )
        self._reasoning: ChunkTemplate[int] = ChunkTemplate(
            lambda index, text: self._delta(index, ChatDelta(reasoning_content=text))
        )
        self._arguments: ChunkTemplate[tuple[int, int]] = ChunkTemplate(
            lambda key, text: self._call(*key, FunctionDelta(arguments=text))
        )

    def begin(self) -> Sequence[StreamEvent]:
        opened = [self._delta(index, self._opening) for index in range(self._choices)]
        return [StreamEvent(chunk) for chunk in opened]

    def feed(self, prompt: int, event: Event) -> Sequence[StreamEvent]:
        if isinstance(event, Finished):
            left = [
                self._input(choice, call, reader.finish())
                for (choice, call), reader in self._inputs.items()
                if choice == event.choice
            ]
            return [StreamEvent(chunk) for chunk in (*left, self._written(event)) if chunk]
        chunk = self._written(event)
        return [StreamEvent(chunk)] if chunk else ()

    def idle(self) -> StreamEvent:
        return StreamEvent(self._delta(0, ChatDelta()))

    def end(self, usage: Usage) -> Sequence[StreamEvent]:
        if not self._with_usage:
            return ()
        chunk = self._chunk([])
        chunk.usage = usage_body(usage)
        return [StreamEvent(chunk.to_json())]

    def _written(self, event: Event) -> bytes:
        match event:
            case TextDelta():
                if event.logprobs:
                    return self._delta(event.choice, ChatDelta(content=event.text), event.logprobs)
                return self._text.fill(event.choice, event.text)
            case ReasoningDelta():
                return self._reasoning.fill(event.choice, event.text)
            case ToolCallDelta() if (event.choice, event.call) in self._inputs:
                told = self._inputs[event.choice, event.call].push(event.arguments)
                return self._input(event.choice, event.call, told)
            case ToolCallStart() if event.name in self._customs:
                self._inputs[event.choice, event.call] = InputReader()
                custom = CustomDelta(name=event.name, input="")
                opening = CallDelta(index=event.call, id=event.id, type="custom", custom=custom)
                return self._delta(event.choice, ChatDelta(tool_calls=[opening]))
            case ToolCallDelta():
                return self._arguments.fill((event.choice, event.call), event.arguments)
            case ToolCallStart():
                function = FunctionDelta(name=event.name, arguments="")
                return self._call(event.choice, event.call, function, id=event.id, type="function")
            case Finished():
                reason = _reason(event.reason, self._old_calls)
                return self._delta(event.choice, ChatDelta(), reason=reason)
        return b""

    def _input(self, index: int, call: int, told: str) -> bytes:
        if not told:
            return b""
        added = CallDelta(index=call, custom=CustomDelta(input=told))
        return self._delta(index, ChatDelta(tool_calls=[added]))

    def _call(self, index: int, call: int, function: FunctionDelta, **opening: Any) -> bytes:
        if self._old_calls:
            return self._delta(index, ChatDelta(function_call=function))
        added = CallDelta(index=call, **opening, function=function)
        return self._delta(index, ChatDelta(tool_calls=[added]))

    def _delta(
        self,
        index: int,
        delta: ChatDelta,
        logprobs: tuple[TokenLogprob, ...] = (),
        reason: str | None = None,
    ) -> bytes:
        scores = chat_logprobs(logprobs) if self._with_logprobs and logprobs else None
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=scores, finish_reason=reason)
        chunk = self._chunk([choice])
        if self._with_usage:
            chunk.usage = None  # unknown until the end
        return chunk.to_json()

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._header.id,
            object="chat.completion.chunk",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
        )


def _reason(reason: str, old_calls: bool) -> str:
    return "function_call" if old_calls and reason == "tool_calls" else reason
