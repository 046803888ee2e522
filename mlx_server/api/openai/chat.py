"""`POST /v1/chat/completions`: to the internal request, and from events to OpenAI's shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.generation import (
    END_MARK,
    SYSTEM_FINGERPRINT,
    ChunkTemplate,
    Generator,
    Header,
    Protocols,
    check_choices,
    sampling,
    usage_body,
)
from mlx_server.api.http.dependencies import CallerDep, MetricsDep, ServiceDep, SettingsDep
from mlx_server.api.http.failures import documented
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.http.streaming import sse
from mlx_server.config import Settings
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import (
    Caller,
    ChatPrompt,
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
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    FunctionDelta,
    MessageToolCall,
    PromptOptions,
    chat_logprobs,
)
from mlx_server.schemas.openai.common import ErrorBody
from mlx_server.schemas.openai.messages import Message

MAX_CALLS = 1 << 16
"""More than any one answer makes."""

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
    request = to_inference(body, caller, settings)
    written = Protocols(
        id_prefix="chatcmpl",
        answer=lambda header: ChatAnswer(header, body),
        stream=lambda header: ChatStream(header, body),
    )
    generator = Generator(service, settings, metrics, [request], written)
    return generator.stream() if body.stream else generator.answer()


def to_inference(
    body: ChatCompletionRequest, caller: Caller, settings: Settings
) -> InferenceRequest:
    """What the body asks for, free of the protocol."""
    check_choices(body, settings)
    prompt = chat_prompt(body.messages, body)
    must_call = prompt.use is not None and prompt.use.choice != "auto"
    if must_call and body.ignore_eos:
        raise BadRequest("`ignore_eos` would go on past the call.", param="ignore_eos")
    return InferenceRequest(
        model=body.model,
        prompt=prompt,
        caller=caller,
        sampling=sampling(body),
        seed=body.seed,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=body.stops,
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        # It binds what is said where nothing is called.
        constraint=None if must_call else body.constraint,
        ignore_eos=body.ignore_eos,
        priority=body.priority,
        keep_alive=body.keep_alive,
    )


def chat_prompt(messages: Sequence[Message], options: PromptOptions) -> ChatPrompt:
    """The conversation. A last message of the assistant is the beginning of the answer."""
    last = messages[-1]
    opens = last.role == "assistant" and not last.calls
    if opens and not last.text and len(messages) > 1:
        # An empty beginning is none.
        messages, opens = messages[:-1], False
    return ChatPrompt(
        messages=[message.for_template() for message in messages],
        tools=[tool.for_template() for tool in options.all_tools] or None,
        template_kwargs=options.template_kwargs,
        continue_final=opens,
        use=options.tool_use(),
        thinking_budget=options.most_thinking,
    )


@dataclass(slots=True)
class _Call:
    """A tool call as far as it has come."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def function(self) -> CalledFunction:
        return CalledFunction(name=self.name, arguments="".join(self.arguments))

    def body(self) -> MessageToolCall:
        return MessageToolCall(id=self.id, type="function", function=self.function())


@dataclass(slots=True)
class _Choice:
    """An answer as far as it has come."""

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
    """Folds events into a chat completion."""

    def __init__(self, header: Header, body: ChatCompletionRequest) -> None:
        self._header = header
        self._with_logprobs = body.logprobs
        self._old_calls = bool(body.functions)
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
            message.tool_calls = [call.body() for call in choice.calls]
        return message


class ChatStream:
    """Turns events into chunks of a chat completion."""

    def __init__(self, header: Header, body: ChatCompletionRequest) -> None:
        self._header = header
        self._choices = body.n
        self._with_logprobs = body.logprobs
        self._with_usage = body.stream_options.include_usage
        self._old_calls = bool(body.functions)
        # An answer that is only calls has no content, not an empty one.
        self._opening = ChatDelta(role="assistant", content=None if body.all_tools else "")
        self._text = ChunkTemplate(lambda index, text: self._delta(index, ChatDelta(content=text)))
        self._reasoning = ChunkTemplate(
            lambda index, text: self._delta(index, ChatDelta(reasoning_content=text))
        )
        self._arguments = ChunkTemplate(
            lambda number, text: self._call(
                *divmod(number, MAX_CALLS), FunctionDelta(arguments=text)
            )
        )

    def begin(self) -> bytes:
        return b"".join(self._delta(index, self._opening) for index in range(self._choices))

    def feed(self, prompt: int, event: Event) -> bytes:
        match event:
            case TextDelta():
                if event.logprobs:
                    return self._delta(event.choice, ChatDelta(content=event.text), event.logprobs)
                return self._text.fill(event.choice, event.text)
            case ReasoningDelta():
                return self._reasoning.fill(event.choice, event.text)
            case ToolCallDelta():
                return self._arguments.fill(event.choice * MAX_CALLS + event.call, event.arguments)
            case ToolCallStart():
                function = FunctionDelta(name=event.name, arguments="")
                return self._call(event.choice, event.call, function, id=event.id, type="function")
            case Finished():
                reason = _reason(event.reason, self._old_calls)
                return self._delta(event.choice, ChatDelta(), reason=reason)
        return b""

    def end(self, usage: Usage) -> bytes:
        if not self._with_usage:
            return b""
        chunk = self._chunk([])
        chunk.usage = usage_body(usage)
        return sse(chunk.to_json())

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
        told = chat_logprobs(logprobs) if self._with_logprobs and logprobs else None
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=told, finish_reason=reason)
        chunk = self._chunk([choice])
        if self._with_usage:
            # Asked for, and not known before the end.
            chunk.usage = None
        return sse(chunk.to_json())

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
    """Why a choice ended, in the words of who asked for tools or for functions."""
    return "function_call" if old_calls and reason == "tool_calls" else reason
