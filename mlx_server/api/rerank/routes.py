"""`POST /v1/rerank`, `/v2/rerank` and `/rerank`."""

from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.http.dependencies import CallerDep, EmbeddingsDep, MetricsDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.http.streaming import WholeAnswer
from mlx_server.api.http.wire import ApiProtocol
from mlx_server.api.rerank.wire import WIRE, documented
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import Caller
from mlx_server.schemas.rerank.ranks import (
    ApiVersion,
    BilledUnits,
    Ranked,
    RankedDocument,
    RankMeta,
    RankTokens,
    RankUsage,
    RerankRequest,
    RerankResponse,
)
from mlx_server.services.embeddings import EmbeddingRequest, EmbeddingService
from mlx_server.services.reranking import Ranking, rank
from mlx_server.telemetry.metrics import Metrics
from mlx_server.telemetry.watch import Watch

router = APIRouter(route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 429, 500, 503, 504)


@router.post("/v1/rerank", response_model=RerankResponse, responses=ERRORS)
@router.post("/rerank", response_model=RerankResponse, responses=ERRORS)
async def rerank(
    body: RerankRequest, caller: CallerDep, embeddings: EmbeddingsDep, metrics: MetricsDep
) -> Response:
    """Rank documents by how well they answer a query."""
    told = body.return_documents is not False
    return _answer(body, caller, embeddings, metrics, _Telling("1", told))


@router.post("/v2/rerank", response_model=RerankResponse, responses=ERRORS)
async def rerank_v2(
    body: RerankRequest, caller: CallerDep, embeddings: EmbeddingsDep, metrics: MetricsDep
) -> Response:
    """The same in version 2, which repeats no documents."""
    told = body.return_documents is True
    return _answer(body, caller, embeddings, metrics, _Telling("2", told))


class _Telling:
    def __init__(self, version: str, documents: bool) -> None:
        self.version = version
        self.documents = documents

    def body(self, ranking: Ranking, texts: list[str], top_n: int | None) -> bytes:
        return RerankResponse(
            id=str(uuid4()),
            model=ranking.model,
            results=[self._ranked(i, score, texts) for i, score in ranking.best(top_n)],
            meta=RankMeta(
                api_version=ApiVersion(version=self.version),
                billed_units=BilledUnits(search_units=1),
                tokens=RankTokens(input_tokens=ranking.tokens),
            ),
            usage=RankUsage(prompt_tokens=ranking.tokens, total_tokens=ranking.tokens),
        ).to_json()

    def _ranked(self, index: int, score: float, texts: list[str]) -> Ranked:
        ranked = Ranked(index=index, relevance_score=score)
        if self.documents:
            ranked.document = RankedDocument(text=texts[index])
        return ranked


def _answer(
    body: RerankRequest,
    caller: Caller,
    embeddings: EmbeddingService,
    metrics: Metrics,
    telling: _Telling,
) -> Response:
    texts = [_text(index, one, body.rank_fields) for index, one in enumerate(body.documents)]
    request = EmbeddingRequest(
        model=body.model,
        inputs=texts,
        caller=caller,
        query=body.query if isinstance(body.query, str) else body.query.text,
        cut=True,
        keep_alive=body.keep_alive,
    )

    async def answer() -> bytes:
        watch = Watch.embeddings(request.model, len(texts), caller, metrics)
        ranking = await rank(embeddings, request, watch)
        return telling.body(ranking, texts, body.top_n)

    return WholeAnswer(answer)


def _text(index: int, document: str | dict[str, Any], fields: list[str]) -> str:
    """Raises BadRequest for an object without a text."""
    if isinstance(document, str):
        return document
    if fields:
        return "\n".join(f"{name}: {document[name]}" for name in fields if name in document)
    if isinstance(text := document.get("text"), str):
        return text
    raise BadRequest(
        "A document that is an object must have a string `text`, or fields named in `rank_fields`.",
        param=f"documents.{index}",
    )


RERANK = ApiProtocol(wire=WIRE, routers=(router,), prefixes=("/rerank", "/v1/rerank", "/v2/rerank"))
