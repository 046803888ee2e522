"""Refusals of rerankers."""

import httpx


def assert_refused(answer: httpx.Response, status: int) -> str:
    """The message of a refusal in the shape that Cohere's and Jina's clients read."""
    assert answer.status_code == status, answer.text
    body: dict[str, str] = answer.json()
    assert set(body) == {"message", "detail"}
    assert body["message"] == body["detail"] != ""
    return body["message"]
