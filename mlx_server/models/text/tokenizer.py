"""Loading tokenizers; text to tokens and back."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlx_server.errors import ContextLengthExceeded, ModelLoadFailed
from mlx_server.models.store.folder import one_line
from mlx_server.models.text.token_bytes import TokenBytes

MLX_LM_SETTINGS = {"chat_template_type", "tool_parser_type"}
"""Entries of tokenizer_config.json that only mlx-lm's own loader understands."""
LONG_TOKEN = 8
"""Characters per token above which a text's length is checked before it is tokenized."""
PART = 1 << 16
"""Characters of a long text to tokenize at a time."""
PART_SLACK = 256
"""Tokens that cutting a text may add to a part."""
BATCH = 64
"""Texts to tokenize at a time, so that other requests get their turn."""


class TextTokenizer:
    """Methods block and are safe to call from any thread."""

    def __init__(self, backend: Tokenizer) -> None:
        # A truncation or padding in tokenizer.json would change prompts.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.size: int = backend.get_vocab_size(with_added_tokens=True)
        self._token_bytes = TokenBytes(backend)
        self._beginning = self._find_beginning()

    def encode(self, text: str) -> list[int]:
        """A text to continue, with the tokenizer's beginning-of-text token."""
        ids = self.encode_bare(text)
        if ids[: len(self._beginning)] == self._beginning:
            return ids
        return self._beginning + ids

    def encode_bare(self, text: str) -> list[int]:
        """Nothing is added."""
        # Only the methods for batches release Python's lock.
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_complete(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Whole texts, with all that the tokenizer adds. Raises as `check_length` does."""
        for index, text in enumerate(texts):
            try:
                self.check_length(text, limit, f"input.{index}")
            except ContextLengthExceeded as error:
                message = f"Text {index} of the input: {error.message}"
                raise ContextLengthExceeded(message, param=error.param) from error
        tokens: list[list[int]] = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            encoded = self.backend.encode_batch_fast(batch, add_special_tokens=True)
            tokens += [one.ids for one in encoded]
        return tokens

    def check_length(self, text: str, limit: int, param: str) -> None:
        """Refuse a text of far more than `limit` tokens without tokenizing all of it.

        Raises ContextLengthExceeded for `param`. A text that passes may still be too long.
        """
        if len(text) > limit * LONG_TOKEN and self._certainly_exceeds(text, limit):
            raise ContextLengthExceeded(
                f"This model's context holds {limit} tokens; your text of {len(text)} characters "
                "has more.",
                param=param,
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 in running text; empty for special and unknown tokens."""
        return self._token_bytes(token)

    def token_name(self, token: int) -> str:
        """As the vocabulary writes it."""
        return self.backend.id_to_token(token) or f"<{token}>"

    def token_id(self, name: str) -> int | None:
        return self.backend.token_to_id(name)

    def special_tokens(self) -> dict[str, int]:
        """Ids by text."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def _find_beginning(self) -> list[int]:
        # What the tokenizer adds behind a text would end it, and is left out.
        bare = self.backend.encode("a", add_special_tokens=False).ids
        whole: list[int] = self.backend.encode("a", add_special_tokens=True).ids
        return whole[: whole.index(bare[0])] if bare else []

    def _certainly_exceeds(self, text: str, limit: int) -> bool:
        count = 0
        for start in range(0, len(text), PART):
            count += max(0, len(self.encode_bare(text[start : start + PART])) - PART_SLACK)
            if count > limit:
                return True
        return False


def import_tokenizers() -> Any:
    """mlx-lm's `tokenizer_utils`, to be imported by the main thread before any other.

    Importing takes seconds. It leaves MLX's state in its thread, and a thread that ends while the
    interpreter does aborts there.
    """
    # mlx_lm comes first: it silences advice that transformers gives when it is imported.
    from mlx_lm import tokenizer_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    return tokenizer_utils


def load_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """mlx-lm's wrapper around the tokenizer in `path`. Raises ModelLoadFailed."""
    tokenizer_utils = import_tokenizers()
    try:
        wrapper = _load_wrapper(tokenizer_utils, path, trust_remote_code)
    except Exception as error:
        # Broken files surface as whatever the parser in question raises; the Rust ones raise
        # bare Exceptions.
        raise ModelLoadFailed(
            f"The tokenizer in {path.name} could not be loaded: {one_line(error)}"
        ) from error
    if not isinstance(getattr(wrapper, "backend_tokenizer", None), Tokenizer):
        raise ModelLoadFailed(f"The tokenizer in {path.name} has no fast form (tokenizer.json).")
    return wrapper


def _load_wrapper(tokenizer_utils: Any, path: Path, trust_remote_code: bool) -> Any:
    """As `tokenizer_utils.load`, reading tokenizer.json once instead of twice.

    A reading takes 0.1 s for a vocabulary of 50,000, and holds Python's lock.
    """
    from transformers import AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if MLX_LM_SETTINGS & tokenizer.init_kwargs.keys():
        return tokenizer_utils.load(path, options)
    parser_name = tokenizer_utils._infer_tool_parser(tokenizer)
    if parser_name is None:
        return tokenizer_utils.TokenizerWrapper(tokenizer)
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{parser_name}")
    return tokenizer_utils.TokenizerWrapper(
        tokenizer,
        tool_parser=parser.parse_tool_call,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
    )
