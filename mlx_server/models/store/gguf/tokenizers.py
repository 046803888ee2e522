"""A GGUF file's tokenizer: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama")."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlx_server.errors import BadRequest
from mlx_server.models.store.gguf.reading import GgufFile
from mlx_server.models.store.gguf.splits import SPLITS, WHOLE_WORDS, rule_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# `tokenizer.ggml.token_type`
NORMAL, CONTROL, USER = 1, 3, 4
SPACE = "\u2581"
"""How SentencePiece writes a space."""


def build_tokenizer(file: GgufFile) -> "Tokenizer":
    """Raises BadRequest for a kind that is not known."""
    kind = file.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file)
    elif kind == "llama":
        tokenizer = _sentence_piece(file)
    else:
        raise BadRequest(
            f"its tokenizer is {kind!r}; only byte-level BPE ('gpt2') and SentencePiece's BPE "
            "('llama') are supported"
        )
    if adds_bos(file):
        tokenizer.post_processor = _bos_in_front(file)
    _add_tokens(tokenizer, file)
    return tokenizer


def token_ids(file: GgufFile) -> dict[str, Any]:
    ends = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    found = {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}) or None,
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: value for name, value in found.items() if value is not None}


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    texts = {key: _named_token(file, name) for name, key in names.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos(file),
        "add_prefix_space": False,
        "model_max_length": file.option("context_length"),
        "chat_template": file.get("tokenizer.chat_template"),
    } | texts
    return {key: value for key, value in config.items() if value is not None}


def adds_bos(file: GgufFile) -> bool:
    # Llama's files that omit it mean yes.
    usual = file.get("tokenizer.ggml.model") == "llama" or rule_of(file) == "llama-bpe"
    return bool(file.get("tokenizer.ggml.add_bos_token", usual))


def _byte_level(file: GgufFile) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    rule = rule_of(file)
    if rule not in SPLITS:
        raise BadRequest(f"its pre-tokenizer {rule!r} is none of {', '.join(sorted(SPLITS))}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(
        models.BPE(vocab=_vocab(file), merges=merges, ignore_merges=rule in WHOLE_WORDS)
    )
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [Split(Regex(expression), "isolated") for expression in SPLITS[rule]]
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([*splits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GgufFile) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = _named_token(file, "unknown")
    vocab = _vocab(file)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(_merges(vocab, file)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    # As llama.cpp does, also behind special tokens.
    front = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocab: dict[str, int], file: GgufFile) -> Iterator[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; BPE goes by a list of pairs."""
    tokens, scores = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.scores")
    kinds = _kinds(file)
    if scores is None:
        raise BadRequest("its metadata has no tokenizer.ggml.scores")
    found = [
        (-scores[index], vocab[token[:cut]], vocab[token[cut:]])
        for index, token in enumerate(tokens)
        if kinds[index] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    for _, left, right in sorted(found):
        yield tokens[left], tokens[right]


def _vocab(file: GgufFile) -> dict[str, int]:
    return {token: index for index, token in enumerate(file.get("tokenizer.ggml.tokens", []))}


def _kinds(file: GgufFile) -> list[int]:
    count = len(file.get("tokenizer.ggml.tokens", []))
    return file.get("tokenizer.ggml.token_type") or [NORMAL] * count


def _add_tokens(tokenizer: "Tokenizer", file: GgufFile) -> None:
    from tokenizers import AddedToken

    pairs = list(zip(file.get("tokenizer.ggml.tokens"), _kinds(file), strict=True))
    # In two calls, since each builds the search for all anew.
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, k in pairs if k == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, k in pairs if k == USER])


def _bos_in_front(file: GgufFile) -> Any:
    from tokenizers.processors import TemplateProcessing

    token = _named_token(file, "bos")
    if token is None:
        raise BadRequest("its metadata names no beginning-of-text token, and asks to add it")
    identity = file.get("tokenizer.ggml.bos_token_id")
    return TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, identity)]
    )


def _named_token(file: GgufFile, name: str) -> str | None:
    index = file.get(f"tokenizer.ggml.{name}_token_id")
    tokens: list[str] = file.get("tokenizer.ggml.tokens", [])
    return tokens[index] if index is not None and index < len(tokens) else None
