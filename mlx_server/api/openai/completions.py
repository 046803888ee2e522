"""`POST /v1/completions`."""

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.chunk_template import ChunkTemplate
from mlx_server.api.generation import AnswerFormats, Generator
from mlx_server.api.http.dependencies import CallerDep, MetricsDep, ServiceDep, SettingsDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.openapi import event_stream
from mlx_server.api.http.wire import StreamEvent
from mlx_server.api.openai.chunks import SYSTEM_FINGERPRINT, Header, usage_body
from mlx_server.api.openai.logprobs import joined, text_logprobs
from mlx_server.api.openai.parameters import (
    as_list,
    check_choices,
    constraint,
    sampling,
    seed,
    stop_strings,
    unasked,
)
from mlx_server.api.openai.wire import END_MARK, documented
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
    DEFAULT_MAX_TOKENS,
    MAX_PROMPTS,
    Completion,
    CompletionChoice,
    CompletionRequest,
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
    requests = to_inference(body, caller, settings.max_choices)
    formats = AnswerFormats(
        answer=lambda accepted: CompletionAnswer(
            Header.fresh("cmpl", accepted), body, accepted.prompts
        ),
        stream=lambda accepted: CompletionStream(
            Header.fresh("cmpl", accepted), body, accepted.prompts
        ),
        echo=body.echo,
    )
    generator = Generator(service, metrics, requests, formats)
    return generator.stream() if body.stream else generator.answer()


def to_inference(
    body: CompletionRequest, caller: Caller, max_choices: int
) -> list[InferenceRequest]:
    check_choices(body.n, max_choices)
    prompts = as_list(body.prompt)
    if len(prompts) * body.n > MAX_PROMPTS:
        raise BadRequest(f"Prompts times `n` is at most {MAX_PROMPTS}.", param="prompt")
    bound = constraint(body)
    return [
        InferenceRequest(
            model=body.model,
            prompt=TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt),
            caller=caller,
            sampling=sampling(body),
            unasked=unasked(body),
            seed=seed(body),
            max_tokens=_limit(body),
            stop=stop_strings(body),
            n=body.n,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            constraint=bound,
            ignore_eos=body.ignore_eos,
            priority=body.priority,
            keep_alive=body.keep_alive,
        )
        for prompt in prompts
    ]


def _limit(body: CompletionRequest) -> int | None:
    if body.max_tokens < 0:
        return None
    return body.max_tokens if body.max_tokens or body.echo else DEFAULT_MAX_TOKENS


class Echo:
    """Prompt texts and scores; `decoded` is empty without `echo`."""

    def __init__(self, body: CompletionRequest, decoded: Sequence[str]) -> None:
        prompts = as_list(body.prompt)
        # Echo the text as sent; tokenizing may have changed it.
        self.texts = [
            prompt if isinstance(prompt, str) else text
            for prompt, text in zip(prompts, decoded, strict=False)
        ] or [""] * len(prompts)
        self.scored: list[tuple[TokenLogprob, ...]] = [()] * len(prompts)


class CompletionAnswer:
    def __init__(self, header: Header, body: CompletionRequest, decoded: Sequence[str]) -> None:
        self._echo = Echo(body, decoded)
        total = len(self._echo.texts) * body.n
        self._header = header
        self._n = body.n
        self._with_logprobs = body.logprobs is not None
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
            logprobs = joined(
                text_logprobs(self._echo.scored[index // self._n], start=0),
                text_logprobs(self._logprobs[index], start=len(echoed)),
            )
        return CompletionChoice(
            index=index,
            text=echoed + "".join(self._texts[index]),
            logprobs=logprobs,
            finish_reason=self._reasons[index],
        )


class CompletionStream:
    def __init__(self, header: Header, body: CompletionRequest, decoded: Sequence[str]) -> None:
        self._header = header
        self._n = body.n
        self._with_logprobs = body.logprobs is not None
        self._with_usage = body.stream_options.include_usage
        self._echo = Echo(body, decoded)
        self._bare: ChunkTemplate[int] = ChunkTemplate(self._text)

    def begin(self) -> Sequence[StreamEvent]:
        if self._with_logprobs:
            return ()  # the echo comes with its scores
        return [
            event
            for prompt, text in enumerate(self._echo.texts)
            if text
            for event in self._echoed(prompt)
        ]

    def feed(self, prompt: int, event: Event) -> Sequence[StreamEvent]:
        if isinstance(event, PromptScored):
            self._echo.scored[prompt] = event.logprobs
            return self._echoed(prompt)
        index = prompt * self._n + event.choice
        if isinstance(event, Finished):
            return [StreamEvent(self._text(index, "", reason=event.reason))]
        if not isinstance(event, TextDelta):
            return ()
        if event.logprobs:
            start = len(self._echo.texts[prompt])
            return [StreamEvent(self._text(index, event.text, event.logprobs, start))]
        return [StreamEvent(self._bare.fill(index, event.text))]

    def idle(self) -> StreamEvent:
        return StreamEvent(self._text(0, ""))

    def end(self, usage: Usage) -> Sequence[StreamEvent]:
        if not self._with_usage:
            return ()
        chunk = self._chunk([])
        chunk.usage = usage_body(usage)
        return [StreamEvent(chunk.to_json())]

    def _echoed(self, prompt: int) -> list[StreamEvent]:
        first = prompt * self._n
        text, scored = self._echo.texts[prompt], self._echo.scored[prompt]
        choices = range(first, first + self._n)
        return [StreamEvent(self._text(index, text, scored)) for index in choices]

    def _text(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        start: int = 0,
        reason: str | None = None,
    ) -> bytes:
        scores = text_logprobs(logprobs, start) if self._with_logprobs and logprobs else None
        choice = CompletionChoice(index=index, text=text, logprobs=scores, finish_reason=reason)
        chunk = self._chunk([choice])
        if self._with_usage:
            chunk.usage = None  # unknown until the end
        return chunk.to_json()

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._header.id,
            object="text_completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
        )
