"""Ollama's protocol as tests read it: lines, their order, and refusals."""

import json
from collections.abc import Iterable
from typing import Any

import httpx
from ollama import ChatResponse, GenerateResponse

TIMINGS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
COUNTS = ("prompt_eval_count", "eval_count")


def lines_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream, which must be lines of JSON."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def check_order(
    lines: Iterable[dict[str, Any]], kind: type[ChatResponse | GenerateResponse]
) -> None:
    """stream: part* end; a part has no figures, the end says nothing and has all of them."""
    *parts, end = lines
    for line in (*parts, end):
        assert kind.model_validate(line)
        assert line["model"]
        assert line["created_at"].endswith("Z")
    for part in parts:
        assert part["done"] is False
        assert part.keys().isdisjoint({"done_reason", *TIMINGS, *COUNTS})
    assert end["done"] is True
    assert end["done_reason"] in ("stop", "length")
    assert said(end) == ("", "")
    assert all(type(end[name]) is int and end[name] >= 0 for name in (*TIMINGS, *COUNTS))
    parted = end["load_duration"] + end["prompt_eval_duration"] + end["eval_duration"]
    assert 0 < parted <= end["total_duration"]


def said(line: dict[str, Any]) -> tuple[str, str]:
    """A line's text and thinking."""
    one = line.get("message") or {"content": line.get("response"), **line}
    return one["content"], one.get("thinking", "")


def assert_refused(answer: httpx.Response, status: int) -> str:
    """The message of a refusal in Ollama's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert 0 < len(body["error"]) <= 500
    return str(body["error"])
