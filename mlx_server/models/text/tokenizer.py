"""Loads tokenizers; encodes and decodes."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer

from mlx_server.errors import ContextLengthExceeded, ModelLoadFailed
from mlx_server.models.store.chat_template import OF_PROCESSOR, read_template
from mlx_server.models.store.folder import one_line, read_config
from mlx_server.models.text.narrow import narrow_transformers
from mlx_server.models.text.token_bytes import TokenBytes, decoder_of
from mlx_server.tokenizer_json import AddedToken, read_parts

LONG_TOKEN = 8
"""Characters per token of `limit` above which length is checked first."""
LONGEST_TOKEN = 128
"""Characters. Texts have far shorter ones, a few of blanks aside."""
PART = 1 << 16
"""Characters."""
PART_SLACK = 256
"""Tokens that a cut may add."""
BATCH = 64
"""Texts, between which other requests run."""


class TextTokenizer:
    """Methods block and are thread-safe."""

    def __init__(self, backend: Tokenizer) -> None:
        # Truncation or padding set in tokenizer.json would change prompts.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.size: int = backend.get_vocab_size(with_added_tokens=True)
        self._token_bytes = TokenBytes(backend)
        self._beginning = self._find_beginning()

    def encode(self, text: str) -> list[int]:
        """With the beginning-of-text token only."""
        ids = self.encode_bare(text)
        if ids[: len(self._beginning)] == self._beginning:
            return ids
        return self._beginning + ids

    def encode_bare(self, text: str) -> list[int]:
        # Only batch methods release the GIL.
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_complete(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """With special tokens added. Raises as `check_length`."""
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

    def encode_cut(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """With special tokens added; ends that would exceed `limit` tokens are left out."""
        room = max(0, limit - self.backend.num_special_tokens_to_add(is_pair=False))
        tokens: list[list[int]] = []
        for start in range(0, len(texts), BATCH):
            batch = [text[: limit * LONGEST_TOKEN] for text in texts[start : start + BATCH]]
            for encoding in self.backend.encode_batch(batch, add_special_tokens=False):
                encoding.truncate(room)
                tokens.append(self.backend.post_process(encoding).ids)
        return tokens

    def encode_pairs(
        self, first: str, texts: Sequence[str], limit: int
    ) -> list[tuple[list[int], int]]:
        """`first` with each of `texts`, special tokens added, and where the second begins. The ends
        of texts are left out that would exceed `limit` tokens, and of `first` half of them.
        """
        room = max(0, limit - self.backend.num_special_tokens_to_add(is_pair=True))
        most = limit * LONGEST_TOKEN
        [head] = self.backend.encode_batch([first[:most]], add_special_tokens=False)
        head.truncate(room // 2)
        pairs: list[tuple[list[int], int]] = []
        for start in range(0, len(texts), BATCH):
            batch = [text[:most] for text in texts[start : start + BATCH]]
            for encoding in self.backend.encode_batch(batch, add_special_tokens=False):
                encoding.truncate(room - len(head))
                pair = self.backend.post_process(head, encoding)
                kinds = pair.type_ids
                pairs.append((pair.ids, kinds.index(1) if 1 in kinds else len(kinds)))
        return pairs

    def check_length(self, text: str, limit: int, param: str) -> None:
        """Raises ContextLengthExceeded for far more than `limit` tokens, without tokenizing all of
        `text`. A text that passes may still be too long.
        """
        if len(text) > limit * LONG_TOKEN and (count := self._certain_count(text, limit)) > limit:
            raise ContextLengthExceeded(
                f"The prompt is too long: more than {count} tokens > {limit} maximum of this "
                "model's context.",
                param=param,
            )

    def decode(self, tokens: Sequence[int]) -> str:
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        return self._token_bytes(token)

    def token_name(self, token: int) -> str:
        return self.backend.id_to_token(token) or f"<{token}>"

    def token_id(self, name: str) -> int | None:
        return self.backend.token_to_id(name)

    def special_tokens(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def _find_beginning(self) -> list[int]:
        # What the tokenizer appends would end a text to continue.
        bare = self.backend.encode("a", add_special_tokens=False).ids
        whole: list[int] = self.backend.encode("a", add_special_tokens=True).ids
        return whole[: whole.index(bare[0])] if bare else []

    def _certain_count(self, text: str, limit: int) -> int:
        """No more tokens than `text` has; counted until there are more than `limit`."""
        count = 0
        for start in range(0, len(text), PART):
            count += max(0, len(self.encode_bare(text[start : start + PART])) - PART_SLACK)
            if count > limit:
                break
        return count


def is_stored(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether the folder's tokenizer.json has the tokens of `tokenizer`, for grammars."""
    stored = read_parts(folder)
    if stored is None:
        return False
    known = tokenizer.get_added_tokens_decoder()
    added = {AddedToken(id_, token.content, token.special) for id_, token in known.items()}
    return added == set(stored.added_tokens) and decoder_of(tokenizer) == stored.decoder


def import_tokenizers() -> Any:
    """mlx-lm's `tokenizer_utils`. Import in the main thread first: importing takes a while and
    leaves MLX's state in its thread, and a thread that ends during interpreter shutdown aborts
    there.
    """
    narrow_transformers()
    # mlx_lm first: it silences transformers' advice.
    from mlx_lm import tokenizer_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    return tokenizer_utils


def load_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """mlx-lm's wrapper. Raises ModelLoadFailed."""
    tokenizer_utils = import_tokenizers()
    try:
        wrapper = _load_wrapper(tokenizer_utils, path, trust_remote_code)
    except Exception as error:
        # Parsers raise anything on broken files; Rust ones a bare Exception.
        raise ModelLoadFailed(
            f"The tokenizer in {path.name} could not be loaded: {one_line(error)}"
        ) from error
    if not isinstance(getattr(wrapper, "backend_tokenizer", None), Tokenizer):
        raise ModelLoadFailed(f"The tokenizer in {path.name} has no fast form (tokenizer.json).")
    return wrapper


def _load_wrapper(tokenizer_utils: Any, path: Path, trust_remote_code: bool) -> Any:
    """`tokenizer_utils.load`, but reads tokenizer.json once, not twice (0.1 s under the GIL for a
    vocabulary of 50,000), the model's sizes not at all, and chat_template.json too.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path,
        config=_bare_config(read_config(path)),
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_template(path / OF_PROCESSOR)
    settings = tokenizer.init_kwargs
    options = {}
    if kind := settings.get("chat_template_type"):
        module = _module("chat_templates", kind)
        options["chat_template"] = getattr(module, "apply_chat_template", None)
    if kind := settings.get("tool_parser_type") or tokenizer_utils._infer_tool_parser(tokenizer):
        module = _module("tool_parsers", kind)
        options["tool_parser"] = module.parse_tool_call
        options["tool_call_start"] = module.tool_call_start
        options["tool_call_end"] = module.tool_call_end
    return tokenizer_utils.TokenizerWrapper(tokenizer, **options)


def _module(package: str, name: str) -> ModuleType:
    if not name.isidentifier():
        raise ValueError(f"{name!r} is none of mlx-lm's {package}")
    return importlib.import_module(f"mlx_lm.{package}.{name}")


def _bare_config(config: dict[str, Any]) -> Any:
    """What the choice of a tokenizer's class asks of a model's configuration. That itself is not
    made: its class may refuse a model that mlx-lm computes.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    try:
        kind = CONFIG_MAPPING[config.get("model_type")]  # which has no `get` of its own
    except KeyError:
        kind = PretrainedConfig
    bare = kind.__new__(kind)
    names = ("model_type", "tokenizer_class", "model_name")
    vars(bare).update({name: config[name] for name in names if isinstance(config.get(name), str)})
    return bare
