"""Real tokenizers: text to tokens and back, tokens to bytes, lengths, special tokens in texts."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from mlx_server.errors import ContextLengthExceeded
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.special_tokens import SpecialTokens
from mlx_server.models.text.token_bytes import TokenBytes
from mlx_server.models.text.tokenizer import TextTokenizer
from mlx_server.models.text.worker import token_table
from tests.support.tiny import FAMILIES, build_tiny_model, tiny_tokenizer, token_id

SAMPLES = [
    "Hello, world!",
    " leading and  double spaces\n\n\ttabs ",
    "naïve café 日本語 Привет 🦙👩‍👩‍👧 ▁",
    '{"a": [1, 2.5, null]}',
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    """That of each family, as its adapter has it."""
    parent = tmp_path_factory.mktemp("tokenizers")
    folders = {family: build_tiny_model(parent / family, family) for family in FAMILIES}
    return {family: load_adapter(folder, family).tokenizer for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", SAMPLES)
def test_the_bytes_of_tokens_join_to_their_text(
    tokenizers: dict[str, TextTokenizer], family: str, text: str
) -> None:
    tokenizer = tokenizers[family]
    ids = tokenizer.encode(text)
    # SentencePiece puts a space in front of a text.
    space = " " if family == "mistral" else ""
    expected = (space + text.replace("▁", " " if family in ("mistral", "gemma") else "▁")).encode()
    assert b"".join(map(tokenizer.token_bytes, ids)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_adds_its_bytes_to_a_text(
    tokenizers: dict[str, TextTokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    before = tokenizer.encode_bare("a")
    start = tokenizer.decode(before)
    for token in range(tokenizer.size):
        expected = tokenizer.decode([*before, token]).removeprefix(start)
        assert tokenizer.token_bytes(token).decode(errors="replace") == expected, token


@pytest.mark.parametrize("family", FAMILIES)
def test_all_256_bytes_can_be_said(tokenizers: dict[str, TextTokenizer], family: str) -> None:
    tokenizer = tokenizers[family]
    said = {tokenizer.token_bytes(token) for token in range(tokenizer.size)}
    assert {bytes([value]) for value in range(256)} - said <= {b" "}


def test_special_and_unknown_tokens_have_no_bytes_and_others_do(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    tokenizer = tokenizers["qwen"]
    ids = {name: token_id(tokenizer.backend, name) for name in ("<|im_end|>", "<think>")}
    assert tokenizer.token_bytes(ids["<|im_end|>"]) == b""
    assert tokenizer.token_bytes(ids["<think>"]) == b"<think>"
    assert tokenizer.token_bytes(tokenizer.size + 7) == b""
    assert tokenizer.token_name(ids["<|im_end|>"]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("vocab", "decoder", "expected"),
    [
        (["a", "##b", "c"], decoders.WordPiece(), [b" a", b"b", b" c"]),
        (["a", "▁b", "<0xE2>"], decoders.Metaspace(), [b"a", b" b", b"<0xE2>"]),
        (["a", "b"], decoders.Fuse(), [b"a", b"b"]),
    ],
)
def test_the_decoder_decides_what_a_piece_means(
    vocab: list[str], decoder: Any, expected: list[bytes]
) -> None:
    model = models.WordLevel({piece: i for i, piece in enumerate(vocab)}, unk_token="a")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes(i) for i in range(len(vocab))] == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_a_text_gets_one_beginning_of_text_even_if_it_brings_its_own(
    tokenizers: dict[str, TextTokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    bos = str(FAMILIES[family].bos)
    bos_id = token_id(tokenizer.backend, bos)
    assert tokenizer.encode("Hello")[0] == bos_id
    assert tokenizer.encode(bos + "Hello").count(bos_id) == 1
    assert tokenizer.encode("") == [bos_id]


@pytest.mark.parametrize("family", ["qwen", "phi", "generic"])
def test_a_tokenizer_without_a_beginning_of_text_adds_none(
    tokenizers: dict[str, TextTokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    assert tokenizer.encode("Hello") == tiny_tokenizer(family).encode("Hello").ids
    assert tokenizer.encode("") == []


def test_a_truncation_left_in_the_file_cuts_no_prompt(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_adapter(tmp_path, "x").tokenizer
    assert tokenizer.decode(tokenizer.encode(SAMPLES[0])) == SAMPLES[0]
    assert 4 < len(tokenizer.encode(SAMPLES[0])) < 64


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fronts_table_has_the_bytes_or_the_name_of_every_token(
    tokenizers: dict[str, TextTokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    table = token_table(tokenizer)
    for token in range(-2, tokenizer.size + 3):
        expected = tokenizer.token_bytes(token) if token >= 0 else b""
        assert table.token_bytes(token) == expected, token
        known = 0 <= token < tokenizer.size
        assert table.names.get(token) == (
            tokenizer.token_name(token) if known and not expected else None
        )


# lengths


class Counting(TextTokenizer):
    """Counts the characters that it is given to tokenize."""

    characters = 0

    def encode_bare(self, text: str) -> list[int]:
        self.characters += len(text)
        return super().encode_bare(text)


def test_a_text_far_beyond_the_limit_is_refused_before_all_of_it_is_tokenized() -> None:
    tokenizer = Counting(tiny_tokenizer("llama"))
    text = "Hello, world! " * 100_000
    with pytest.raises(ContextLengthExceeded, match=r"more than \d+ tokens > 1000 ") as refused:
        tokenizer.check_length(text, 1000, "prompt")
    assert refused.value.param == "prompt"
    assert tokenizer.characters < len(text) / 10


def test_a_text_that_may_fit_is_not_refused() -> None:
    tokenizer = TextTokenizer(tiny_tokenizer("llama"))
    text = "Hello, world! " * 5_000
    count = len(tokenizer.encode_bare(text))
    tokenizer.check_length(text, count, "prompt")
    tokenizer.check_length(text, count // 2 + 1, "prompt")  # short enough to be tokenized whole


def test_texts_are_tokenized_as_each_by_itself_and_the_one_too_long_is_named() -> None:
    tokenizer = TextTokenizer(tiny_tokenizer("llama"))
    texts = [f"{SAMPLES[i % 4]} {i}" for i in range(150)]
    alone = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_complete(texts, 100) == alone
    with pytest.raises(ContextLengthExceeded, match=r"^Text 1 of the input: ") as refused:
        tokenizer.encode_complete(["short", "Hello, world! " * 5_000], 100)
    assert refused.value.param == "input.1"


# special tokens in texts


def test_special_tokens_are_found_in_texts_the_longest_first() -> None:
    special = SpecialTokens({"<a>": 1, "<a>b": 2, "|": 3})
    assert list(special.split("x<a>b|<a>y")) == ["x", 2, 3, 1, "y"]
    assert list(special.split("<a>")) == [1]
    assert list(special.split("")) == []
    assert special.find("<a>b", "none", "||") == {2: "<a>b", 3: "|"}


def test_where_nothing_is_special_a_text_is_plain() -> None:
    special = SpecialTokens({})
    assert list(special.split("<a>")) == ["<a>"]
    assert special.find("<a>") == {}
