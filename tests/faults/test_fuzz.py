"""Whatever a client sends to any route of the description, the answer is one that it describes.

Schemathesis makes the requests, right and wrong ones, from the OpenAPI description that a running
server gives out, and compares the answers with it.
"""

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import APIOperation, Case, CheckContext, GenerationMode, Response
from schemathesis.checks import load_all_checks

from mlx_server.config import Settings
from mlx_server.main import create_app
from tests.server.test_errors import assert_refused
from tests.support import anthropic, ollama, rerank
from tests.support.bert import build_tiny_bert
from tests.support.hub import Hub, running
from tests.support.server import PLAIN, Server, serving
from tests.support.tiny import build_tiny_model

Operation = APIOperation[Any, Any, Any, Any]

MODEL = "fuzzed"
UNLOADED = "unloaded"
REMOVED, REMOVED_TOO = "removed", "removed-too"
EMBEDDER = "embedder"
REPO = "tiny/pulled"
ABSENT, NOTHING = "no/such-model", "none"
USER_KEY, ADMIN_KEY = "user-key", "admin-key"
CONTEXT = 96
UNAVAILABLE = {
    "model_loading",
    "model_load_failed",
    "insufficient_memory",
    "unavailable",
    "queue_timeout",
}
QUICK = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
KEY = {"Authorization": f"Bearer {ADMIN_KEY}"}
SECONDS = 30.0

NAMES = {
    "/v1/models/{model_id}": [MODEL, UNLOADED, ABSENT],
    "/admin/models/{model_id}/load": [UNLOADED, ABSENT],
    "/admin/models/{model_id}/unload": [UNLOADED, ABSENT],
    "/admin/models/{model_id}/pin": [MODEL, ABSENT],
    "/admin/models/{model_id}/unpin": [MODEL, ABSENT],
    # The first is loaded, and so is not removed.
    "/admin/models/{model_id}": [MODEL, REMOVED, ABSENT],
}
"""The models that a path names where it takes any text."""
BODY_NAMES = {
    "ChatCompletionRequest": [MODEL, ABSENT],
    "CompletionRequest": [MODEL, ABSENT],
    "PullRequest": [REPO, ABSENT],
    "TokenizeRequest": [MODEL, ABSENT],
    "DetokenizeRequest": [MODEL, ABSENT],
    "EmbeddingRequest": [EMBEDDER, ABSENT],
    "MessagesRequest": [MODEL, ABSENT],
    "CountTokensRequest": [MODEL, ABSENT],
    "ChatRequest": [MODEL, ABSENT],
    "GenerateRequest": [MODEL, ABSENT],
    "EmbedRequest": [EMBEDDER, ABSENT],
    "EmbeddingsRequest": [EMBEDDER, ABSENT],
    "RerankRequest": [EMBEDDER, ABSENT],
    "ModelShow": [MODEL, ABSENT],
    "ModelPull": [REPO, ABSENT],
    "ModelDelete": [REMOVED_TOO, ABSENT],
    "ResponseRequest": [MODEL, ABSENT],
    "InputTokensRequest": [MODEL, ABSENT],
}
"""The same for the field `model` of a body."""


LONG = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
GENERATING = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/messages"}
WIDE = GENERATING | {
    *("POST /v1/messages/count_tokens", "POST /tokenize", "POST /api/chat", "POST /api/generate"),
}
"""Routes whose bodies have many fields."""
OPEN = {"GET /health", "GET /ready"}
"""Routes that ask for no key."""
ROUTES = [
    f"{method.upper()} {path}"
    for path, operations in create_app(Settings()).openapi()["paths"].items()
    for method in operations
]
KEPT = ("/v1/responses", "/v1/conversations")
"""Routes of what is stored, whose items are told apart by more than the description can say."""
LABELS = [label for label in ROUTES if not label.partition(" ")[2].startswith(KEPT)]
KEPT_LABELS = [label for label in ROUTES if label not in LABELS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, a model to ask, models to lose, and one to pull."""
    tiny = build_tiny_model(tmp_path_factory.mktemp("tiny") / MODEL, context=CONTEXT)
    home = tmp_path_factory.mktemp("home")
    for name in (MODEL, UNLOADED, REMOVED, REMOVED_TOO):
        shutil.copytree(tiny, home / "models" / name)
    build_tiny_bert(home / "models" / EMBEDDER)
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    with running(Hub({REPO: files})) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        with serving(
            home,
            *("--model", MODEL),
            *("--model", EMBEDDER),
            context_length=CONTEXT,
            api_keys=[USER_KEY],
            admin_keys=[ADMIN_KEY],
        ) as server:
            yield server


@pytest.fixture(scope="module")
def description(server: Server) -> dict[str, Any]:
    """What the server says of itself."""
    answer = httpx.get(f"{server.url}/openapi.json", headers=KEY, **PLAIN)
    described: dict[str, Any] = answer.raise_for_status().json()
    return described


def stored(url: str) -> dict[str, str]:
    """By the names of paths' parameters: what was just stored."""
    with httpx.Client(base_url=url, headers=KEY, **PLAIN) as client:
        asked = {"model": MODEL, "input": "Hello", "max_output_tokens": 2}
        response = client.post("/v1/responses", json=asked).raise_for_status()
        said = {"items": [{"role": "user", "content": "Hello"}]}
        conversation = client.post("/v1/conversations", json=said).raise_for_status().json()["id"]
        items = client.get(f"/v1/conversations/{conversation}/items").raise_for_status()
    return {
        "response_id": response.json()["id"],
        "conversation_id": conversation,
        "item_id": items.json()["data"][0]["id"],
    }


def pointed(description: dict[str, Any], url: str) -> dict[str, Any]:
    """The description for the fuzzer: what exists, and no status that is not named.

    A text made up at random never names a model, and `default` describes every status.
    """
    schemas = description["components"]["schemas"]
    lasting, passing = stored(url), stored(url)
    for schema, names in BODY_NAMES.items():
        optional = "model" not in schemas[schema].get("required", ())
        known = [*names, None] if optional else names
        schemas[schema]["properties"]["model"] = {"enum": known}
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("default", None)
            for parameter in operation.get("parameters", ()):
                if path.startswith(KEPT) and parameter["in"] == "path":
                    known = passing if method == "delete" else lasting
                    parameter["schema"] = {"enum": [known[parameter["name"]], NOTHING]}
                elif parameter["in"] == "path":
                    parameter["schema"] = {"enum": NAMES[path]}
    return description


CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
)
"""Schemathesis's own checks that apply here."""
KEYLESS = "ignored_auth"
"""One more, which sends everything again without a key."""


def error_has_the_shape(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """A refusal is told in its protocol's shape, and leaks nothing."""
    if response.status_code >= 400:
        assert response.headers["x-request-id"]
        body = response.json()
        keys = {"message", "type", "param", "code"}
        if "/api/" in case.operation.label:
            body = {"error": {"message": body.pop("error"), **body}}
            keys = {"message"}
        if "/rerank" in case.operation.label:
            assert body["message"] == body.pop("detail")
            body, keys = {"error": body}, {"message"}
        if "/messages" in case.operation.label:
            assert body.pop("type") == "error"
            assert body.pop("request_id") == response.headers["request-id"][0]
            assert set(body["error"]) - {"details"} == {"message", "type"}
            keys = set(body["error"])
        assert list(body) == ["error"]
        assert set(body["error"]) == keys
        assert 0 < len(body["error"]["message"]) <= 500
        assert b"Traceback" not in response.content


def code_of(body: dict[str, Any]) -> Any:
    error = body["error"]
    return error["code"] if "code" in error else error["details"]["error_code"]


def server_has_not_failed(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """Nothing is the server's fault; a model may be unavailable where that is described."""
    if response.status_code >= 500:
        assert response.status_code == 503
        if "/api/" not in case.operation.label and "/rerank" not in case.operation.label:
            assert code_of(response.json()) in UNAVAILABLE
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        assert b'"server_error"' not in response.content
        assert b'"api_error"' not in response.content


def reaches_its_route(case: Case[Any]) -> bool:
    """Whether the path is the route's: in lists Schemathesis leaves these characters as they are,
    and what follows them belongs to the path no more."""
    return not any(mark in str(value) for value in case.path_parameters.values() for mark in "?#")


class Fuzzer:
    """Sends requests that the description allows, and others, and compares the answers with it."""

    def __init__(
        self, server: Server, description: dict[str, Any], checks: Sequence[str] = CHECKS
    ) -> None:
        load_all_checks()
        config = schemathesis.Config()
        config.projects.override.update(base_url=server.url)
        self.schema = schemathesis.openapi.from_dict(
            pointed(description, server.url), config=config
        )
        self.checks = [getattr(schemathesis.checks, name) for name in checks]
        self.checks += [error_has_the_shape, server_has_not_failed]
        self.answers: Counter[tuple[str, int]] = Counter()

    def right(self, label: str, how: settings) -> None:
        """Requests that the description allows."""
        self._random(self._operation(label), GenerationMode.POSITIVE, how)

    def wrong(self, label: str, how: settings) -> None:
        """Requests that it does not allow, where there is anything to do wrong."""
        operation = self._operation(label)
        if any(operation.iter_parameters()) or operation.body or label not in OPEN:
            self._random(operation, GenerationMode.NEGATIVE, how)

    def limits(self, label: str, step: int = 1) -> None:
        """Each `step`th request at, or just beyond, a limit that the description states."""
        operation = self._operation(label)
        cases = self.schema.iter_coverage_cases(
            operation,
            generation_modes=list(GenerationMode),
            generation_config=self.schema.config.generation_for(operation=operation),
        )
        for case in itertools.islice(cases, 0, None, step):
            if reaches_its_route(case):
                self._send(case)

    def _random(self, operation: Operation, mode: GenerationMode, how: settings) -> None:
        @how
        @given(case=operation.as_strategy(generation_mode=mode).filter(reaches_its_route))
        def fuzz(case: Case[Any]) -> None:
            self._send(case)

        fuzz()

    def _operation(self, label: str) -> Operation:
        operation = self.schema.find_operation_by_label(label)
        assert operation is not None
        return operation

    def _send(self, case: Case[Any]) -> None:
        response = case.call_and_validate(headers=KEY, checks=self.checks, timeout=SECONDS)
        self.answers[case.operation.label, response.status_code] += 1


@pytest.fixture(scope="module")
def fuzzer(server: Server, description: dict[str, Any]) -> Fuzzer:
    return Fuzzer(server, description)


@pytest.mark.parametrize("label", LABELS)
def test_every_answer_to_requests_made_up_is_as_described(fuzzer: Fuzzer, label: str) -> None:
    cases = 6 if label in GENERATING else 3
    fuzzer.right(label, settings(QUICK, max_examples=cases))
    fuzzer.wrong(label, settings(QUICK, max_examples=cases))
    assert fuzzer.answers[label, 200]


@pytest.mark.parametrize("label", LABELS)
def test_every_answer_at_the_limits_is_as_described(fuzzer: Fuzzer, label: str) -> None:
    # Hundreds for a body with many fields; the soak sends them all.
    fuzzer.limits(label, 23 if label in WIDE else 7 if label.startswith("POST") else 1)


@pytest.mark.parametrize("label", KEPT_LABELS)
def test_no_request_made_up_for_what_is_stored_breaks_anything(fuzzer: Fuzzer, label: str) -> None:
    fuzzer.right(label, settings(QUICK, max_examples=3))
    fuzzer.wrong(label, settings(QUICK, max_examples=3))
    fuzzer.limits(label, 23 if label == "POST /v1/responses" else 7)
    if label.startswith("GET"):
        assert fuzzer.answers[label, 200]


@pytest.mark.soak
def test_thousands_of_answers_are_as_described(server: Server, description: dict[str, Any]) -> None:
    fuzzer = Fuzzer(server, description, (*CHECKS, KEYLESS))
    for label in ROUTES:
        cases = 300 if label in GENERATING else 60
        fuzzer.right(label, settings(LONG, max_examples=cases))
        fuzzer.wrong(label, settings(LONG, max_examples=cases))
        fuzzer.limits(label)
    assert sum(fuzzer.answers.values()) >= 2000


@pytest.mark.parametrize("label", [label for label in ROUTES if label not in OPEN])
def test_no_route_is_open_to_those_who_may_not_use_it(server: Server, label: str) -> None:
    method, path = label.split()
    url = server.url + re.sub(r"\{\w+\}", NOTHING if path.startswith(KEPT) else ABSENT, path)
    refused: list[tuple[dict[str, str], int]] = [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer \xff"}, 401),
        ({"Authorization": f"Basic {ADMIN_KEY}"}, 401),
        ({"x-api-key": USER_KEY[:-1]}, 401),
    ]
    if path.startswith("/admin") or path in ("/api/pull", "/api/delete"):
        refused.append(({"x-api-key": USER_KEY}, 403))
    for headers, status in refused:
        answer = httpx.request(method, url, headers=httpx.Headers(headers, "latin-1"), **PLAIN)
        refusing = assert_refused
        if "/messages" in path:
            refusing = anthropic.assert_refused
        elif path.startswith("/api/"):
            refusing = ollama.assert_refused
        elif path.endswith("/rerank"):
            refusing = rerank.assert_refused
        refusing(answer, status)
