"""`/v1/rerank` over HTTP: cross-encoders and embedding models behind a real server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.bert import ReferenceEncoder, build_tiny_bert, wordpiece
from tests.support.rerank import assert_refused
from tests.support.server import PLAIN, Server, serving
from tests.support.tiny import build_tiny_model

JUDGE, ROBERTA, EMBEDDER, WRITER = "judge", "judge-roberta", "embedder", "writer"
CONTEXT = 64
QUERY = "the quick fox"
DOCUMENTS = ["The quick brown fox", "A server answers requests", "Hello, world!", "fox"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tiny_bert(folder / JUDGE, scores=True, context=CONTEXT)
    build_tiny_bert(folder / ROBERTA, model_type="xlm-roberta", scores=True, context=CONTEXT)
    build_tiny_bert(folder / EMBEDDER, context=CONTEXT)
    build_tiny_model(folder / WRITER)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), model_dirs=[str(models)]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, **PLAIN) as client:
        yield client


def asked(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "query": QUERY, "documents": DOCUMENTS} | more


def ranked(client: httpx.Client, body: dict[str, Any], path: str = "/v1/rerank") -> dict[str, Any]:
    """The answer, whose results must be in order."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    scores = [one["relevance_score"] for one in whole["results"]]
    assert scores == sorted(scores, reverse=True)
    return whole


def by_index(answer: dict[str, Any]) -> list[float]:
    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    return [scores[index] for index in range(len(scores))]


@pytest.mark.parametrize("model", [JUDGE, ROBERTA])
def test_a_cross_encoder_judges_as_its_reference(
    client: httpx.Client, models: Path, model: str
) -> None:
    reference = ReferenceEncoder(models / model)
    pairs = [wordpiece().encode(QUERY, text) for text in DOCUMENTS]
    expected = [reference.score(pair.ids, pair.type_ids) for pair in pairs]
    answer = ranked(client, asked(model))
    assert by_index(answer) == pytest.approx(expected, abs=1e-4)
    tokens = sum(len(pair.ids) for pair in pairs)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_an_embedding_model_ranks_by_the_cosine(client: httpx.Client) -> None:
    body = {"model": EMBEDDER, "input": [QUERY, *DOCUMENTS]}
    query, *vectors = [
        one["embedding"] for one in client.post("/v1/embeddings", json=body).json()["data"]
    ]
    cosines = [sum(map(float.__mul__, query, vector)) for vector in vectors]
    assert by_index(ranked(client, asked(EMBEDDER))) == pytest.approx(cosines, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "version", "told"),
    [("/v1/rerank", "1", 4), ("/rerank", "1", 4), ("/v2/rerank", "2", 0)],
)
def test_answers_have_what_coheres_and_jinas_clients_read(
    client: httpx.Client, path: str, version: str, told: int
) -> None:
    answer = ranked(client, asked(EMBEDDER), path)
    assert answer["id"]
    assert answer["model"] == EMBEDDER
    assert answer["meta"]["api_version"]["version"] == version
    assert answer["meta"]["billed_units"]["search_units"] == 1
    documents = [one["document"]["text"] for one in answer["results"] if "document" in one]
    assert len(documents) == told
    short = ranked(client, asked(EMBEDDER, top_n=2, return_documents=not told), path)
    assert [one["index"] for one in short["results"]] == [
        one["index"] for one in answer["results"][:2]
    ]
    assert all(("document" in one) is not bool(told) for one in short["results"])


def test_documents_may_be_objects(client: httpx.Client) -> None:
    plain = ranked(client, asked(JUDGE))
    texts = [{"text": text, "id": index} for index, text in enumerate(DOCUMENTS)]
    assert by_index(ranked(client, asked(JUDGE, documents=texts))) == by_index(plain)
    assert by_index(ranked(client, asked(JUDGE, query={"text": QUERY}))) == by_index(plain)
    fields = [{"title": "fox", "body": text} for text in DOCUMENTS]
    told = ranked(client, asked(JUDGE, documents=fields, rank_fields=["title", "none"]))
    first, *others = by_index(told)
    assert others == pytest.approx([first] * 3, abs=1e-5), "a row of a batch rounds as it lies"


def test_what_exceeds_the_context_is_cut(client: httpx.Client) -> None:
    long = "fox " * 500
    answer = ranked(client, asked(JUDGE, query=long, documents=[long, "fox"]))
    assert answer["usage"]["total_tokens"] <= 2 * CONTEXT


def test_models_that_rank_are_listed_as_such(client: httpx.Client) -> None:
    listed = {one["id"]: one["capabilities"] for one in client.get("/v1/models").json()["data"]}
    told = {name: (one["rerank"], one["embeddings"]) for name, one in listed.items()}
    assert told == {
        JUDGE: (True, False),
        ROBERTA: (True, False),
        EMBEDDER: (True, True),
        WRITER: (False, False),
    }


BAD: list[dict[str, Any]] = [
    {"query": ""},
    {"query": 1},
    {"query": {"title": "a"}},
    {"documents": []},
    {"documents": "a"},
    {"documents": [1]},
    {"documents": [{"title": "a"}]},
    {"documents": ["a"] * 2049},
    {"top_n": 0},
    {"top_n": "all"},
    {"return_documents": "yes"},
    {"rank_fields": "title"},
    {"model": 1},
    {"model": WRITER},
    {"model": "no-such-model"},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:40])
def test_a_bad_request_is_told_why(client: httpx.Client, bad: dict[str, Any]) -> None:
    answer = client.post("/v1/rerank", json=asked(JUDGE) | bad)
    assert_refused(answer, 404 if bad.get("model") == "no-such-model" else 400)


def test_a_cross_encoder_makes_no_vectors_and_no_text(client: httpx.Client) -> None:
    vectors = client.post("/v1/embeddings", json={"model": JUDGE, "input": "fox"})
    assert vectors.json()["error"]["code"] == "model_cannot_embed"
    text = client.post("/v1/completions", json={"model": JUDGE, "prompt": "fox"})
    assert text.json()["error"]["code"] == "model_cannot_generate"
