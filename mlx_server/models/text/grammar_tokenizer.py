"""The tokenizer in the form that llguidance reads, which knows fewer decoders than there are."""

from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders

from mlx_server.models.text.token_bytes import (
    decoder_of,
    decoder_steps,
    replacements,
    treats_each_token_alone,
)

FILE = "tokenizer.json"
KNOWN = frozenset({"ByteLevel", "ByteFallback"})
"""Steps by one of which llguidance knows a decoder."""


class _Added(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _Stored(msgspec.Struct):
    added_tokens: list[_Added] = []
    decoder: dict[str, Any] | None = None


def written(tokenizer: Tokenizer) -> str:
    """As tokenizer.json."""
    steps = decoder_steps(decoder_of(tokenizer))
    if KNOWN.intersection(_kinds(steps)) or not steps or not treats_each_token_alone(steps):
        return tokenizer.to_str()
    replacing = [decoders.Replace(old, new) for old, new in replacements(steps)]
    known = Tokenizer.from_str(tokenizer.to_str())
    known.decoder = decoders.Sequence([*replacing, decoders.ByteFallback(), decoders.Fuse()])
    return known.to_str()


def is_stored(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether the folder's own tokenizer.json serves as well as `written`."""
    try:
        stored = msgspec.json.decode((folder / FILE).read_bytes(), type=_Stored)
        kinds = _kinds(decoder_steps(stored.decoder))
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return False
    known = tokenizer.get_added_tokens_decoder()
    added = {_Added(id_, token.content, token.special) for id_, token in known.items()}
    same = kinds == _kinds(decoder_steps(decoder_of(tokenizer)))
    return bool(KNOWN.intersection(kinds)) and same and added == set(stored.added_tokens)


def _kinds(steps: list[dict[str, Any]]) -> list[str]:
    return [step["type"] for step in steps]
