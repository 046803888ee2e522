"""Bytes of tokens in running text."""

import json
import re
from typing import Any

from tokenizers import Tokenizer

from mlx_server.tokenizer_json import decoder_steps, replacements, treats_each_token_alone

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token ids to bytes that join to the text; none for special and unknown ids. Decoders that
    work token by token (byte level, SentencePiece) are followed step by step, since a token may end
    within a character; otherwise a token's bytes are what it adds to a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._known = {token: b"" for token, details in added.items() if details.special}
        steps = decoder_steps(decoder_of(tokenizer))
        kinds = [step["type"] for step in steps]
        self._byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = replacements(steps)
        self._by_itself = self._byte_level or (bool(kinds) and treats_each_token_alone(steps))
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False).ids

    def __call__(self, token: int) -> bytes:
        known = self._known.get(token)
        if known is None:
            piece = self._tokenizer.id_to_token(token)
            known = b"" if piece is None else self._bytes_of(token, piece)
            self._known[token] = known
        return known

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if not self._by_itself:
            return self._addition_of(token)
        if self._byte_level:
            return _byte_level(piece)
        if self._byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    def _addition_of(self, token: int) -> bytes:
        before = self._tokenizer.decode(self._anchor, skip_special_tokens=True)
        after = self._tokenizer.decode([*self._anchor, token], skip_special_tokens=True)
        return after.removeprefix(before).encode()


def decoder_of(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """As tokenizer.json has it."""
    decoder = tokenizer.decoder
    return None if decoder is None else json.loads(decoder.__getstate__())


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 as itself, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(value): value for value in printable}
    return alphabet | {chr(0x100 + i): value for i, value in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    # Added tokens are plain text: they have characters outside the alphabet.
    if all(character in BYTE_ALPHABET for character in piece):
        return bytes(BYTE_ALPHABET[character] for character in piece)
    return piece.encode()
