"""The API reference as Markdown, from the OpenAPI description that the server itself gives out."""

from collections.abc import Iterator
from typing import Any

METHODS = ("get", "post", "put", "patch", "delete")


def page(description: dict[str, Any]) -> str:
    """One section for each path and method, with the fields of what is sent and answered."""
    lines = ["# API reference", "", "From `GET /openapi.json`; `GET /docs` tries it.", ""]
    for path, item in description["paths"].items():
        for method in METHODS:
            if method in item:
                lines += _operation(f"{method.upper()} {path}", item[method], description)
    return "\n".join(lines) + "\n"


def _operation(title: str, operation: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    yield from (f"## `{title}`", "", operation.get("description") or operation["summary"], "")
    for parameter in operation.get("parameters", ()):
        yield f"* `{parameter['name']}` ({parameter['in']}): {_kind(parameter['schema'])}"
        yield ""
    content = operation.get("requestBody", {}).get("content", {})
    for schema in _schemas(content):
        yield from _fields("Body", schema, whole)
    yield from ("| status | answer |", "| --- | --- |")
    for status, response in operation["responses"].items():
        shapes = ", ".join(_kind(schema) for schema in _schemas(response.get("content", {})))
        yield f"| {status} | {_cell(response['description'])}{f': {shapes}' if shapes else ''} |"
    yield ""


def _schemas(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for media in content.values():
        if schema := media.get("schema"):
            yield schema


def _fields(title: str, schema: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    found = _resolved(schema, whole)
    properties = found.get("properties", {})
    if not properties:
        return
    yield from (f"{title}:", "", "| field | type | |", "| --- | --- | --- |")
    for name, field in properties.items():
        needed = "" if name not in found.get("required", ()) else "**required** "
        remark = _cell(field.get("description", ""))
        yield f"| `{name}` | {_kind(field)} | {needed}{remark} |"
    yield ""


def _resolved(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    if reference := schema.get("$ref"):
        found: dict[str, Any] = whole["components"]["schemas"][reference.rpartition("/")[2]]
        return found
    return schema


def _kind(schema: dict[str, Any]) -> str:
    """Such as `integer`, `[string]`, `Message` or `string or null`."""
    if reference := schema.get("$ref"):
        return f"`{reference.rpartition('/')[2]}`"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_kind(one) for one in schema[key]))
    if isinstance(schema.get("type"), list):
        return " or ".join(_kind(schema | {"type": one}) for one in schema["type"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("title", "any") if "type" not in schema else schema["type"])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
