"""The wire format of rerankers, as Cohere's and Jina's clients send and read it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field

from mlx_server.schemas.objects import (
    INT32_MAX,
    KeepAlive,
    NonEmpty,
    RequestObject,
    ResponseObject,
)

MAX_DOCUMENTS = 2048
MAX_FIELDS = 64


class TextObject(RequestObject):
    text: NonEmpty


class RerankRequest(RequestObject):
    tolerated: ClassVar[Mapping[str, str]] = {
        "max_chunks_per_doc": "A document is cut where the context ends.",
        "max_tokens_per_doc": "See `max_chunks_per_doc`.",
        "truncation": "See `max_chunks_per_doc`.",
    }

    model: str = Field("", description="Left out: the loaded reranker or embedding model.")
    query: NonEmpty | TextObject
    documents: Annotated[
        list[str | dict[str, Any]], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)
    ] = Field(description="Texts, or objects with a `text` or with the fields of `rank_fields`.")
    top_n: int | None = Field(
        None,
        ge=1,
        le=INT32_MAX,
        validation_alias=AliasChoices("top_n", "top_k"),
        description="How many of the best to tell; all if unset. Also taken as `top_k`.",
    )
    return_documents: bool | None = Field(
        None, description="Repeat the documents; if unset, in version 1 only."
    )
    rank_fields: Annotated[list[str], Field(max_length=MAX_FIELDS, fail_fast=True)] = Field(
        default_factory=list, description="Fields of documents that are objects, to judge by."
    )
    keep_alive: KeepAlive | None = Field(
        None, description="How long the model stays loaded afterwards."
    )


class RankedDocument(ResponseObject):
    text: str


class Ranked(ResponseObject):
    index: int
    relevance_score: float
    document: RankedDocument | None = None


class ApiVersion(ResponseObject):
    version: str


class BilledUnits(ResponseObject):
    search_units: int


class RankTokens(ResponseObject):
    input_tokens: int


class RankMeta(ResponseObject):
    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: RankTokens


class RankUsage(ResponseObject):
    prompt_tokens: int
    total_tokens: int


class RerankResponse(ResponseObject):
    """Cohere's fields and Jina's."""

    id: str
    model: str
    results: list[Ranked]
    meta: RankMeta
    usage: RankUsage


class RerankError(ResponseObject):
    """Cohere's field, and Jina's."""

    message: str
    detail: str
