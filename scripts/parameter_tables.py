"""Rewrites the tables of parameters in the docs of each protocol from the request schemas.

`python scripts/parameter_tables.py`; a test fails while a table is stale.
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from mlx_server.schemas.anthropic.requests import MessagesRequest
from mlx_server.schemas.objects import RequestObject
from mlx_server.schemas.openai.chat import ChatCompletionRequest
from mlx_server.schemas.openai.completions import CompletionRequest
from mlx_server.schemas.openai.responses.requests import ResponseRequest

DOCS = Path(__file__).parent.parent / "docs"
Requests = dict[str, type[RequestObject]]
DOCUMENTS: dict[str, Requests] = {
    "openai.md": {
        "chat completions": ChatCompletionRequest,
        "completions": CompletionRequest,
        "responses": ResponseRequest,
    },
    "anthropic.md": {"messages": MessagesRequest},
}
HONOURED, TOLERATED, REFUSED = "honoured", "tolerated", "refused"


def updated(text: str, requests: Requests) -> str:
    """The document `text` with fresh tables between the markers."""
    for name, request in requests.items():
        begin, end = markers(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{table(request)}{end}{after}"
    return text


def markers(name: str) -> tuple[str, str]:
    """The lines before and behind the table of that name."""
    return (
        f"<!-- {name}: written by scripts/parameter_tables.py -->\n",
        f"<!-- end of {name} -->\n",
    )


def table(request: type[RequestObject]) -> str:
    """Every parameter, what becomes of it, and what there is to know."""
    lines = ["| parameter | | remark |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {fate} | {remark} |" for name, fate, remark in sorted(rows(request))]
    return "\n".join(lines).replace("  |", " |") + "\n"


def rows(request: type[RequestObject]) -> Iterator[tuple[str, str, str]]:
    """Name, fate and remark of every parameter that the schema knows."""
    for name, field in request.model_fields.items():
        yield name, HONOURED, _remark(field)
    for name, remark in request.tolerated.items():
        yield name, TOLERATED, remark
    for name, refusal in request.unsupported.items():
        yield name, REFUSED, _sentence(refusal.hint)


def _remark(field: FieldInfo) -> str:
    remark = (field.description or "").replace("|", "\\|")
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool | int | float | str) and default not in ("", False):
        remark = f"{remark} Default: `{str(default).lower()}`.".strip()
    return remark


def _sentence(hint: str) -> str:
    return f"{hint[:1].upper()}{hint[1:]}" + (" honoured." if hint.endswith(" is") else ".")


if __name__ == "__main__":
    for name, requests in DOCUMENTS.items():
        fresh = updated((DOCS / name).read_text(encoding="utf-8"), requests)
        (DOCS / name).write_text(fresh, encoding="utf-8")
