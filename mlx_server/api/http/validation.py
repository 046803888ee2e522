"""One readable error from all that Pydantic finds."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_server.errors import BadRequest

MAX_REASONS = 4


def invalid_request(problems: Sequence[Mapping[str, Any]], body: Any) -> BadRequest:
    if problems[0]["type"] == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", "syntax error")
        return BadRequest(f"The body is not valid JSON: {reason}.", code="invalid_json")
    ranked = [
        (_rank(problem, body), problem)
        for problem in problems
        if problem["loc"][:2] == problems[0]["loc"][:2]
    ]
    best = max(rank for rank, _ in ranked)
    meant = [problem for rank, problem in ranked if rank == best]
    where = _field_path(meant[0], body)
    if not where:
        return BadRequest("The body must be a JSON object.")
    reasons = list(dict.fromkeys(_reason(problem) for problem in meant))
    param = brief(".".join(str(step) for step in where), 100)
    return BadRequest(f"Invalid `{param}`: {' or '.join(reasons[:MAX_REASONS])}.", param=param)


def brief(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _rank(problem: Mapping[str, Any], body: Any) -> tuple[bool, int]:
    """How likely the problem is in the intended branch of a union: one whose types fit, else the
    deepest.
    """
    return not problem["type"].endswith("_type"), len(_field_path(problem, body))


def _reason(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return brief(message[:1].lower() + message[1:], 300)


def _field_path(problem: Mapping[str, Any], body: Any) -> list[str | int]:
    """The path in `body`; Pydantic's also names union branches."""
    loc = problem["loc"]
    if loc[:1] in (("query",), ("path",)):
        return list(loc[1:])
    steps = loc[1:] if loc[:1] == ("body",) else loc
    return _longest_path(steps, body, problem["type"] == "missing")


def _longest_path(steps: Sequence[str | int], here: Any, missing: bool) -> list[str | int]:
    """A branch may be called like a field that is beside it."""
    if not steps:
        return []
    step, rest = steps[0], steps[1:]
    if missing and not rest:
        return [step]
    around = _longest_path(rest, here, missing)
    if not _holds(here, step):
        return around
    return max(around, [step, *_longest_path(rest, here[step], missing)], key=len)


def _holds(here: Any, step: str | int) -> bool:
    if isinstance(here, dict):
        return step in here
    return isinstance(here, list) and isinstance(step, int) and step < len(here)
