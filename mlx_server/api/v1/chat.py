"""`POST /v1/chat/completions`: to the internal request, and from events to OpenAI's shapes."""

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.dependencies import CallerDep, MetricsDep, ServiceDep, SettingsDep
from mlx_server.api.errors import documented
from mlx_server.api.openapi import event_stream
from mlx_server.api.requests import JsonRoute
from mlx_server.api.streaming import sse
from mlx_server.api.v1.generation import (
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
from mlx_server.config import Settings
from mlx_server.schemas.internal import (
    Caller,
    ChatPrompt,
    Event,
    Finished,
    InferenceRequest,
    TextDelta,
    TokenLogprob,
    Usage,
)
from mlx_server.schemas.openai.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    chat_logprobs,
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
    return InferenceRequest(
        model=body.model,
        prompt=_prompt(body),
        caller=caller,
        sampling=sampling(body),
        seed=body.seed,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=body.stops,
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ignore_eos=body.ignore_eos,
        priority=body.priority,
        keep_alive=body.keep_alive,
    )


def _prompt(body: ChatCompletionRequest) -> ChatPrompt:
    """The conversation. A last message of the assistant is the beginning of the answer."""
    messages = body.messages
    last = messages[-1]
    opens = last.role == "assistant" and not last.tool_calls
    if opens and not last.text and len(messages) > 1:
        # An empty beginning is none.
        messages, opens = messages[:-1], False
    return ChatPrompt(
        messages=[message.for_template() for message in messages],
        template_kwargs=body.chat_template_kwargs,
        continue_final=opens,
    )


class ChatAnswer:
    """Folds events into a chat completion."""

    def __init__(self, header: Header, body: ChatCompletionRequest) -> None:
        self._header = header
        self._with_logprobs = body.logprobs
        self._texts: list[list[str]] = [[] for _ in range(body.n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(body.n)]
        self._reasons = [""] * body.n

    def feed(self, prompt: int, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._texts[event.choice].append(event.text)
            self._logprobs[event.choice].extend(event.logprobs)
        elif isinstance(event, Finished):
            self._reasons[event.choice] = event.reason

    def body(self, usage: Usage) -> bytes:
        return ChatCompletion(
            id=self._header.id,
            object="chat.completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=[self._choice(index) for index in range(len(self._texts))],
            usage=usage_body(usage),
        ).to_json()

    def _choice(self, index: int) -> ChatChoice:
        content = "".join(self._texts[index])
        return ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=content, refusal=None),
            logprobs=chat_logprobs(self._logprobs[index]) if self._with_logprobs else None,
            finish_reason=self._reasons[index],
        )


class ChatStream:
    """Turns events into chunks of a chat completion."""

    def __init__(self, header: Header, body: ChatCompletionRequest) -> None:
        self._header = header
        self._choices = body.n
        self._with_logprobs = body.logprobs
        self._with_usage = body.stream_options.include_usage
        self._text = ChunkTemplate(lambda index, text: self._delta(index, ChatDelta(content=text)))

    def begin(self) -> bytes:
        opening = ChatDelta(role="assistant", content="")
        return b"".join(self._delta(index, opening) for index in range(self._choices))

    def feed(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, TextDelta):
            if event.logprobs:
                return self._delta(event.choice, ChatDelta(content=event.text), event.logprobs)
            return self._text.fill(event.choice, event.text)
        if isinstance(event, Finished):
            return self._delta(event.choice, ChatDelta(), reason=event.reason)
        return b""

    def end(self, usage: Usage) -> bytes:
        if not self._with_usage:
            return b""
        chunk = self._chunk([])
        chunk.usage = usage_body(usage)
        return sse(chunk.to_json())

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
