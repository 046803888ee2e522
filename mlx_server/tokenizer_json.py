"""What tokenizer.json says, for the front and the engine, and its form for grammars."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

NAME = "tokenizer.json"
FOLLOWED = frozenset({"ByteLevel", "ByteFallback"})
"""Steps by one of which llguidance knows a decoder."""

Part = dict[str, Any] | None


class AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class Parts(msgspec.Struct):
    """Of the file, without the vocabulary."""

    added_tokens: list[AddedToken] = []
    normalizer: Part = None
    decoder: Part = None


class Vocabulary(msgspec.Struct):
    """By piece, or of Unigram models a list in the order of ids, of pieces and scores."""

    vocab: dict[str, int] | list[tuple[str, float]] = {}


class Words(msgspec.Struct):
    """Of the file, what names tokens."""

    model: Vocabulary
    added_tokens: list[AddedToken] = []


# Made once: msgspec may crash where two threads come upon a type for the first time.
_decode_parts = msgspec.json.Decoder(Parts).decode
_decode_words = msgspec.json.Decoder(Words).decode
_decode_whole = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_parts(folder: Path) -> Parts | None:
    """None where there is no such file."""
    try:
        return _decode_parts((folder / NAME).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None


def read_vocabulary(folder: Path) -> dict[int, str] | None:
    """Pieces by the ids of tokens; None where there is no readable file. Takes a while."""
    try:
        words = _decode_words((folder / NAME).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    vocab = words.model.vocab
    if isinstance(vocab, dict):
        pieces = {id_: piece for piece, id_ in vocab.items()}
    else:
        pieces = {id_: piece for id_, (piece, _) in enumerate(vocab)}
    return pieces | {token.id: token.content for token in words.added_tokens}


def for_grammars(content: bytes) -> bytes:
    """As llguidance takes it right. Raises ValueError.

    It knows fewer decoders than there are; and it cuts texts that a grammar forces, which must come
    out of it letter for letter.
    """
    try:
        whole = _decode_whole(content)
        parts = _decode_parts(content)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    changed = {
        "normalizer": _letter_for_letter(parts.normalizer),
        "decoder": _followed(parts.decoder),
    }
    return msgspec.json.encode(whole | changed)


def _letter_for_letter(normalizer: Part) -> Part:
    """What changes no more than how spaces are written."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        kept = filter(None, map(_letter_for_letter, normalizer["normalizers"]))
        return normalizer | {"normalizers": list(kept)}
    kind, pattern = normalizer["type"], normalizer.get("pattern")
    writes_spaces = kind == "Replace" and pattern == {"String": " "}
    return normalizer if kind == "ByteLevel" or writes_spaces else None


def _followed(decoder: Part) -> Part:
    steps = decoder_steps(decoder)
    known = any(step["type"] in FOLLOWED for step in steps)
    if known or not steps or not treats_each_token_alone(steps):
        return decoder
    replacing = [
        {"type": "Replace", "pattern": {"String": old}, "content": new}
        for old, new in replacements(steps)
    ]
    return {"type": "Sequence", "decoders": [*replacing, {"type": "ByteFallback"}]}


def decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of a decoder as tokenizer.json has it."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in decoder_steps(inner)]


def replacements(steps: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(old, new) texts within pieces."""
    return [_replacement(step) for step in steps if _replaces(step)]


def _replaces(step: dict[str, Any]) -> bool:
    return step["type"] == "Metaspace" or (
        step["type"] == "Replace" and "String" in step["pattern"]
    )


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return step["pattern"]["String"], step["content"]


def treats_each_token_alone(steps: list[dict[str, Any]]) -> bool:
    """Apart from stripping the whole text's ends."""
    fused = False
    for step in steps:
        fused = fused or step["type"] == "Fuse"
        known = step["type"] in ("ByteFallback", "Fuse") or _replaces(step)
        if not known and not (fused and step["type"] == "Strip"):
            return False
    return True
