"""`POST /v1/completions`: to internal requests, and from events to OpenAI's shapes."""

from collections.abc import Sequence

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
    Event,
    Finished,
    InferenceRequest,
    PromptScored,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Usage,
)
from mlx_server.schemas.openai.common import ErrorBody
from mlx_server.schemas.openai.completions import (
    MAX_PROMPTS,
    Completion,
    CompletionChoice,
    CompletionRequest,
    text_logprobs,
)

router = APIRouter(prefix="/v1", route_class=JsonRoute, strict_content_type=False)


@router.post(
    "/completions",
    response_model=Completion,
    responses=documented(400, 401, 403, 404, 413, 429, 500, 503, 504)
    | event_stream([Completion, ErrorBody], marks=[END_MARK]),
)
async def create_completion(
    body: CompletionRequest,
    caller: CallerDep,
    service: ServiceDep,
    settings: SettingsDep,
    metrics: MetricsDep,
) -> Response:
    """Continue a text, or several."""
    requests = to_inference(body, caller, settings)
    written = Protocols(
        id_prefix="cmpl",
        answer=lambda header: CompletionAnswer(header, body),
        stream=lambda header: CompletionStream(header, body),
        echo=body.echo,
    )
    generator = Generator(service, settings, metrics, requests, written)
    return generator.stream() if body.stream else generator.answer()


def to_inference(
    body: CompletionRequest, caller: Caller, settings: Settings
) -> list[InferenceRequest]:
    """What the body asks for, free of the protocol: a request per prompt."""
    check_choices(body, settings)
    if len(body.prompts) * body.n > MAX_PROMPTS:
        raise BadRequest(f"Prompts times `n` is at most {MAX_PROMPTS}.", param="prompt")
    return [
        InferenceRequest(
            model=body.model,
            prompt=TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt),
            caller=caller,
            sampling=sampling(body),
            seed=body.seed,
            max_tokens=body.max_tokens,
            stop=body.stops,
            n=body.n,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            constraint=body.constraint,
            ignore_eos=body.ignore_eos,
            priority=body.priority,
            keep_alive=body.keep_alive,
        )
        for prompt in body.prompts
    ]


class Echo:
    """What a completion repeats of its prompts: their texts and scores."""

    def __init__(self, header: Header, body: CompletionRequest) -> None:
        # A text is repeated as it was sent; tokenizing may have changed it.
        self.texts = [
            given if isinstance(given, str) else known
            for given, known in zip(body.prompts, header.prompts, strict=False)
        ] or [""] * len(body.prompts)
        self.scored: list[tuple[TokenLogprob, ...]] = [()] * len(body.prompts)


class CompletionAnswer:
    """Folds events into a completion."""

    def __init__(self, header: Header, body: CompletionRequest) -> None:
        total = len(body.prompts) * body.n
        self._header = header
        self._n = body.n
        self._with_logprobs = body.logprobs is not None
        self._echo = Echo(header, body)
        self._texts: list[list[str]] = [[] for _ in range(total)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(total)]
        self._reasons = [""] * total

    def feed(self, prompt: int, event: Event) -> None:
        if isinstance(event, PromptScored):
            self._echo.scored[prompt] = event.logprobs
            return
        index = prompt * self._n + event.choice
        if isinstance(event, TextDelta):
            self._texts[index].append(event.text)
            self._logprobs[index].extend(event.logprobs)
        elif isinstance(event, Finished):
            self._reasons[index] = event.reason

    def body(self, usage: Usage) -> bytes:
        return Completion(
            id=self._header.id,
            object="text_completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=[self._choice(index) for index in range(len(self._texts))],
            usage=usage_body(usage),
        ).to_json()

    def _choice(self, index: int) -> CompletionChoice:
        echoed = self._echo.texts[index // self._n]
        logprobs = None
        if self._with_logprobs:
            logprobs = text_logprobs(self._echo.scored[index // self._n], start=0)
            logprobs.extend(text_logprobs(self._logprobs[index], start=len(echoed)))
        return CompletionChoice(
            index=index,
            text=echoed + "".join(self._texts[index]),
            logprobs=logprobs,
            finish_reason=self._reasons[index],
        )


class CompletionStream:
    """Turns events into chunks of a completion."""

    def __init__(self, header: Header, body: CompletionRequest) -> None:
        self._header = header
        self._n = body.n
        self._with_logprobs = body.logprobs is not None
        self._with_usage = body.stream_options.include_usage
        self._echo = Echo(header, body)
        self._bare = ChunkTemplate(self._text)

    def begin(self) -> bytes:
        if self._with_logprobs:
            # The echo comes with its scores.
            return b""
        return b"".join(
            self._echoed(prompt) for prompt, text in enumerate(self._echo.texts) if text
        )

    def feed(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, PromptScored):
            self._echo.scored[prompt] = event.logprobs
            return self._echoed(prompt)
        index = prompt * self._n + event.choice
        if isinstance(event, Finished):
            return self._text(index, "", reason=event.reason)
        if not isinstance(event, TextDelta):
            return b""
        if event.logprobs:
            return self._text(index, event.text, event.logprobs, len(self._echo.texts[prompt]))
        return self._bare.fill(index, event.text)

    def end(self, usage: Usage) -> bytes:
        if not self._with_usage:
            return b""
        chunk = self._chunk([])
        chunk.usage = usage_body(usage)
        return sse(chunk.to_json())

    def _echoed(self, prompt: int) -> bytes:
        first = prompt * self._n
        text, scored = self._echo.texts[prompt], self._echo.scored[prompt]
        return b"".join(self._text(index, text, scored) for index in range(first, first + self._n))

    def _text(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        start: int = 0,
        reason: str | None = None,
    ) -> bytes:
        told = text_logprobs(logprobs, start) if self._with_logprobs and logprobs else None
        choice = CompletionChoice(index=index, text=text, logprobs=told, finish_reason=reason)
        chunk = self._chunk([choice])
        if self._with_usage:
            # Asked for, and not known before the end.
            chunk.usage = None
        return sse(chunk.to_json())

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._header.id,
            object="text_completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
        )
