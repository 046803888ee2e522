"""Streaming text against plain references that see the whole text at once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.engine.protocol import Logprobs
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.tokenizer import TextTokenizer
from mlx_server.schemas.internal import TokenLogprob
from mlx_server.services.output.text import (
    AlignedText,
    TokenDecoder,
    prompt_logprobs,
    token_text,
)
from tests.support.tiny import build_tiny_model, token_id

TEXTS = st.text(st.sampled_from("ab \n.é日🦙👩‍👧▁\u200d\ufffd"), max_size=40)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama", "mistral", "gemma")}
    return {name: load_tiny(folder, name) for name, folder in folders.items()}


def load_tiny(folder: Path, family: str) -> TextTokenizer:
    return load_adapter(build_tiny_model(folder, family), family).tokenizer


def one_byte_tokens(tokenizer: TextTokenizer, text: str) -> list[int]:
    """`text` as tokens of one byte each."""
    ids = {tokenizer.token_bytes(token): token for token in range(tokenizer.size)}
    return [ids[bytes([value])] for value in text.encode()]


def continuation(tokenizer: TextTokenizer, text: str) -> list[int]:
    """`text` in the tokenizer's own pieces, without what it puts in front."""
    ids = tokenizer.encode_bare("\n" + text)
    start = next(i for i, token in enumerate(ids) if b"\n" in tokenizer.token_bytes(token))
    alone = tokenizer.token_bytes(ids[start]) == b"\n"
    return ids[start + 1 :] if alone else one_byte_tokens(tokenizer, text)


# characters


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
@given(text=TEXTS)
def test_streamed_tokens_join_to_the_text(
    tokenizers: dict[str, TextTokenizer], family: str, text: str
) -> None:
    tokenizer = tokenizers[family]
    text = text.replace("▁", "_")
    for tokens in (continuation(tokenizer, text), one_byte_tokens(tokenizer, text)):
        decoder = TokenDecoder(tokenizer.token_bytes)
        assert "".join(map(decoder.push, tokens)) == text
        assert not decoder.inside_character


@given(data=st.binary(max_size=60))
def test_any_bytes_stream_as_they_decode_with_at_most_three_held_back(data: bytes) -> None:
    decoder = TokenDecoder(lambda token: bytes([token]))
    shown = ""
    for count, value in enumerate(data, start=1):
        shown += decoder.push(value)
        # Each prefix that does not end inside a character is shown whole.
        for held in range(4):
            if shown == data[: count - held].decode(errors="replace"):
                break
        else:
            pytest.fail(f"{data[:count]!r} shows {shown!r}")
    expected = data.decode(errors="replace")
    # What is left over at the end and can be no character any more is dropped.
    assert expected.rstrip("\ufffd") == shown.rstrip("\ufffd")


def test_a_character_appears_with_its_last_byte_and_never_in_part() -> None:
    decoder = TokenDecoder(lambda token: bytes([token]))
    assert [decoder.push(value) for value in "🦙é".encode()] == ["", "", "", "🦙", "", "é"]


def test_what_is_whole_in_a_token_is_not_held_back_with_what_is_not() -> None:
    decoder = TokenDecoder([b"ab\xf0", b"\x9f\xa6\x99 c"].__getitem__)
    assert [decoder.push(0), decoder.push(1)] == ["ab", "🦙 c"]


def test_a_model_that_says_only_invalid_bytes_still_streams() -> None:
    decoder = TokenDecoder(lambda token: b"\x9f")
    assert [decoder.push(0) for _ in range(5)] == ["\ufffd"] * 5


def test_a_character_left_incomplete_is_dropped(tokenizers: dict[str, TextTokenizer]) -> None:
    text = AlignedText(tokenizers["llama"])
    tokens = one_byte_tokens(tokenizers["llama"], "a🦙")[:-1]
    assert [text.push(token)[0] for token in tokens] == ["a", "", "", ""]
    assert text.flush() == ("", ())


def test_the_first_token_of_an_answer_keeps_its_space(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["mistral"]
    prompt = tokenizer.encode("The answer is")
    answer = tokenizer.encode_bare("fine.")
    decoder = TokenDecoder(tokenizer.token_bytes)
    streamed = "".join(map(decoder.push, answer))
    assert streamed == tokenizer.decode(prompt + answer).removeprefix(tokenizer.decode(prompt))
    assert streamed == " fine."


# log-probabilities


def run(
    tokenizer: TextTokenizer, tokens: Sequence[int], stops: Sequence[str]
) -> tuple[str, list[TokenLogprob]]:
    """Push `tokens` with entries; at each moment the entries must tell the text so far."""
    aligned, text = AlignedText(tokenizer, stops), ""
    entries: list[TokenLogprob] = []
    for token in tokens:
        more, released = aligned.push(token, Logprobs(token, -1.0, [(token, -1.0)]))
        text += more
        entries += released
        said = b"".join(entry.bytes for entry in entries)
        # A token longer than what may be shown of it waits for the rest.
        assert text.encode().startswith(said) or aligned.stopped
    more, released = aligned.flush()
    return text + more, entries + list(released)


@given(before=TEXTS, after=TEXTS, stop=st.sampled_from(["<end>", "\n\n#", "🦙🦙!", "ab"]))
def test_entries_join_to_the_text_when_a_stop_falls_on_a_token_boundary(
    tokenizers: dict[str, TextTokenizer], before: str, after: str, stop: str
) -> None:
    tokenizer = tokenizers["llama"]
    tokens = one_byte_tokens(tokenizer, before + stop + after)
    whole = before + stop + after
    text, entries = run(tokenizer, tokens, [stop])
    assert text == whole.partition(stop)[0]
    assert b"".join(entry.bytes for entry in entries) == text.encode()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
@given(text=TEXTS)
def test_each_entry_tells_where_its_token_begins(
    tokenizers: dict[str, TextTokenizer], family: str, text: str
) -> None:
    tokenizer = tokenizers[family]
    text = text.replace("▁", "_")
    tokens = continuation(tokenizer, text)
    shown, entries = run(tokenizer, tokens, ["never said"])
    assert shown == text
    assert len(entries) == len(tokens)
    said = b""
    for entry in entries:
        whole = said.decode(errors="ignore")
        assert entry.offset == len(whole)
        said += entry.bytes
    assert said.decode() == text


def test_the_entry_of_a_token_that_the_stop_divides_stays_and_later_ones_go(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    tokenizer = tokenizers["llama"]
    tokens = tokenizer.encode_bare("Hello, world! How")
    text, entries = run(tokenizer, tokens, ["lo, w"])
    assert text == "Hel"
    assert [entry.token for entry in entries] == ["H", "ello"]


def test_nothing_follows_a_stop(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    aligned = AlignedText(tokenizer, ["b"])
    [token] = one_byte_tokens(tokenizer, "b")
    assert aligned.push(token, Logprobs(token, -1.0, [])) == ("", ())
    assert aligned.stopped
    assert aligned.push(token) == ("", ())
    assert aligned.flush() == ("", ())


def test_the_scores_of_an_unfinished_character_are_not_lost(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    tokenizer = tokenizers["llama"]
    tokens = one_byte_tokens(tokenizer, "🦙")[:2]
    text, entries = run(tokenizer, tokens, [])
    assert text == ""
    assert b"".join(entry.bytes for entry in entries) == "🦙".encode()[:2]
    assert [entry.token for entry in entries] == ["bytes:\\xf0", "bytes:\\x9f"]


def test_a_special_token_has_a_name_to_show_and_no_bytes(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    tokenizer = tokenizers["llama"]
    special = token_id(tokenizer.backend, "<|python_tag|>")
    assert token_text(tokenizer, special) == "<|python_tag|>"
    _, [entry] = run(tokenizer, [special], [])
    assert (entry.token, entry.bytes, entry.offset) == ("<|python_tag|>", b"", 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize("text", ["Hello, world 日本🦙", " two  spaces", ""])
def test_a_prompts_entries_point_into_its_text(
    tokenizers: dict[str, TextTokenizer], family: str, text: str
) -> None:
    tokenizer = tokenizers[family]
    tokens = tokenizer.encode(text)
    scores = [None, *(Logprobs(token, -2.0, [(token, -2.0)]) for token in tokens[1:])]
    assert tokenizer.decode(tokens) == text
    entries = prompt_logprobs(tokenizer, tokens, scores, text)
    assert b"".join(entry.bytes for entry in entries) == text.encode()
    assert entries[0].logprob is None
    assert all(entry.logprob == -2.0 for entry in entries[1:])
    for entry in entries:
        assert text.encode()[len(text[: entry.offset].encode()) :].startswith(entry.bytes) or (
            entry.token.startswith("bytes:")
        )
