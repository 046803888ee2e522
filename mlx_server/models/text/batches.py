"""Tokenizing many texts at once, each complete in itself, as embedding models take them."""

from collections.abc import Callable, Sequence

from mlx_server.errors import ContextLengthExceeded
from mlx_server.models.text.adapters.base import Adapter

SLICE = 64
"""Texts given to the tokenizer at once, so that other requests' get their turn."""


def tokenize_all(
    adapter: Adapter, texts: Sequence[str], check_length: Callable[[str], None]
) -> list[list[int]]:
    """Token ids of each of `texts`, with all special tokens that the tokenizer itself adds.

    `check_length` refuses a text that is far too long before it is tokenized; what it raises names
    the text's index.
    """
    for index, text in enumerate(texts):
        try:
            check_length(text)
        except ContextLengthExceeded as error:
            message = f"Text {index} of the input: {error.message}"
            raise ContextLengthExceeded(message, param=f"input.{index}") from error
    tokens: list[list[int]] = []
    for start in range(0, len(texts), SLICE):
        part = list(texts[start : start + SLICE])
        encoded = adapter.tokenizer.encode_batch_fast(part, add_special_tokens=True)
        tokens += [one.ids for one in encoded]
    return tokens
