"""How large the source of a grammar may be."""

from typing import Annotated, Any

from pydantic import AfterValidator

MAX_VALUES = 50_000
MAX_DEPTH = 100
MAX_CHARACTERS = 262_144
"""Of a grammar's source: JSON values, nesting, characters."""
MAX_KEYS = 1000
"""Per object: grammars cost the square of the properties."""


def check_size(value: Any) -> Any:
    """Raises ValueError if `value` is too large for a grammar."""
    level, values, characters, depth = [value], 0, 0, 0
    while level:
        depth += 1
        values += len(level)
        if depth > MAX_DEPTH:
            raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")
        if values > MAX_VALUES:
            raise ValueError(f"must hold at most {MAX_VALUES} values")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                if len(one) > MAX_KEYS:
                    raise ValueError(f"must have at most {MAX_KEYS} keys in one object")
                characters += sum(map(len, one))
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                characters += len(one)
        if characters > MAX_CHARACTERS:
            raise ValueError(f"must hold at most {MAX_CHARACTERS} characters")
        level = below
    return value


Schema = Annotated[dict[str, Any], AfterValidator(check_size)]
