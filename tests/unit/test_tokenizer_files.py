"""Tokenizers from whatever files a model brings, and as grammars have them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from mlx_server.models.store.capabilities import read_capabilities
from mlx_server.models.store.catalog import ModelEntry
from mlx_server.models.text.adapters.registry import load_adapter
from mlx_server.models.text.tokenizer import TextTokenizer, is_stored
from mlx_server.schemas.internal import ChatPrompt
from mlx_server.tokenizer_json import for_grammars, read_vocabulary
from tests.support.spm import write_sentencepiece
from tests.support.tiny import FAMILIES, build_tiny_model, tiny_tokenizer, token_id

TEXT = "Hello, world!"
HELLO = ChatPrompt([{"role": "user", "content": TEXT}])
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def written(tokenizer: Tokenizer) -> str:
    return for_grammars(tokenizer.to_str().encode()).decode()


def rewritten(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content = {name: value for name, value in (content | changes).items() if value is not None}
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_vocabulary_is_read_as_the_tokenizer_has_it(tmp_path: Path, family: str) -> None:
    tokenizer = tiny_tokenizer(family, extra_tokens=["<think>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = tokenizer.get_vocab(with_added_tokens=True)
    assert read_vocabulary(tmp_path) == {id_: piece for piece, id_ in pieces.items()}


def test_a_unigram_vocabulary_is_read_in_its_order(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2)], 0))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path) == {0: "<unk>", 1: "a", 2: "b", 3: "</s>"}
    (tmp_path / "tokenizer.json").write_text("{}")
    assert read_vocabulary(tmp_path) is None


def capabilities(folder: Path) -> Any:
    return read_capabilities(ModelEntry(folder.name, folder, "folder"))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gear", "layer_types": ["conv_mixer"]},
        {"model_type": "exaone4", "sliding_window_pattern": "LG", "rope_scaling": {"type": "odd"}},
        {"model_type": "llama4", "text_config": {"num_attention_heads": "many"}},
        {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.Own"}},
        {"model_type": "llama", "rope_scaling": {"type": "yarn"}, "hidden_size": None},
        {"model_type": "no-such-family"},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_tokenizer_is_no_matter_of_the_models_sizes(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen")
    (folder / "config.json").write_text(json.dumps(config))
    adapter = load_adapter(folder, "model")
    assert adapter.tokenizer.encode(TEXT) == tiny_tokenizer("qwen").encode(TEXT).ids


def test_a_processors_template_counts_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", template=None)
    assert not capabilities(folder).chat
    rewritten(folder / "chat_template.json", chat_template=PLAIN)
    assert load_adapter(folder, "x").template.render(HELLO, add_generation_prompt=True) == (
        f"<user>{TEXT}"
    )
    assert capabilities(folder).chat
    rewritten(folder / "tokenizer_config.json", chat_template="the tokenizer's {{ tools }}")
    assert load_adapter(folder, "x").template.source == "the tokenizer's {{ tools }}"
    assert capabilities(folder).native_tools


def test_a_processors_named_templates_count_too(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", template=None)
    named = [
        {"name": "default", "template": PLAIN},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    rewritten(folder / "chat_template.json", chat_template=named)
    assert load_adapter(folder, "x").template.render(HELLO, add_generation_prompt=True) == (
        f"<user>{TEXT}"
    )
    assert capabilities(folder).native_tools


def test_mlx_lms_own_settings_choose_template_and_parser(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", template=None)
    file = folder / "tokenizer_config.json"
    rewritten(file, chat_template_type="deepseek_v32", tool_parser_type="pythonic")
    adapter = load_adapter(folder, "x")
    assert TEXT in adapter.template.render(HELLO, add_generation_prompt=True)
    assert adapter.parse_calls("[go(a=1)]", []) == [("go", '{"a": 1}')]
    assert capabilities(folder).chat


# grammars


@pytest.mark.parametrize("family", FAMILIES)
def test_usual_tokenizers_need_not_be_sent_to_the_engine(tmp_path: Path, family: str) -> None:
    folder = build_tiny_model(tmp_path / family, family)
    backend = load_adapter(folder, family).tokenizer.backend
    assert is_stored(backend, folder)
    assert LLTokenizer(written(backend)).vocab_size == backend.get_vocab_size()


@pytest.mark.parametrize("change", ["a token", "a flag", "no file", "no JSON", "a decoder"])
def test_a_tokenizer_that_is_not_the_files_is_told_from_it(tmp_path: Path, change: str) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen")
    backend = load_adapter(folder, "model").tokenizer.backend
    file = folder / "tokenizer.json"
    match change:
        case "a token":
            backend.add_tokens([AddedToken("<new>", special=False)])
        case "a flag":
            backend.add_special_tokens([AddedToken("<think>", special=True)])
        case "no file":
            file.unlink()
        case "no JSON":
            file.write_text("{")
        case _:
            rewritten(file, decoder={"type": "Fuse"})
    assert not is_stored(backend, folder)


def test_grammars_know_what_tokenizer_config_adds(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen")
    rewritten(folder / "tokenizer_config.json", additional_special_tokens=["<|mine|>"])
    backend = load_adapter(folder, "model").tokenizer.backend
    mine = token_id(backend, "<|mine|>")
    assert not is_stored(backend, folder)
    assert LLTokenizer(written(backend)).is_special_token(mine)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    ],
)
def test_grammars_have_the_bytes_that_the_text_has(decoder: Any) -> None:
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0), ("é▁", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    ours, theirs = TextTokenizer(tokenizer), LLTokenizer(written(tokenizer))
    for token in range(len(pieces)):
        assert theirs.decode_bytes([token]) == ours.token_bytes(token)
    assert theirs.is_special_token(token_id(tokenizer, "</s>"))


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Prepend("▁"),
        normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "▁")]),
        normalizers.Replace("\n", " "),
    ],
    ids=lambda normalizer: type(normalizer).__name__,
)
def test_a_text_that_a_grammar_forces_comes_letter_for_letter(normalizer: Any) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer("mistral").to_str())  # that one is shared
    tokenizer.normalizer = normalizer
    tokens = LLTokenizer(written(tokenizer), eos_token=2)
    text = "\nCafe\u0301 ﬁn"
    matcher = LLMatcher(tokens, f"start: {json.dumps(text)}")
    said: list[int] = []
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [t for t in range(tokens.vocab_size) if mask[t // 8] >> t % 8 & 1]
        said.append(allowed[0])
        assert matcher.consume_tokens(said[-1:]), matcher.get_error()
    assert tokens.decode_bytes([token for token in said if token != 2]).decode() == text


def test_a_model_with_a_sentencepiece_model_alone_is_bound_by_the_converted_tokenizer(
    tmp_path: Path,
) -> None:
    folder = build_tiny_model(tmp_path / "model", "mistral")
    write_sentencepiece(folder)
    adapter = load_adapter(folder, "model")
    backend = adapter.tokenizer.backend
    assert not is_stored(backend, folder)
    tokens = LLTokenizer(written(backend))
    ids = adapter.tokenizer.encode_bare("good day")
    assert tokens.decode_bytes(ids).strip() == b"good day"
    assert capabilities(folder).structured_output


@pytest.mark.parametrize(("decoder", "bound"), [({"type": "WordPiece"}, False), (None, False)])
def test_structured_output_is_not_promised_of_tokens_that_cannot_be_followed(
    tmp_path: Path, decoder: Any, bound: bool
) -> None:
    folder = build_tiny_model(tmp_path / "model")
    assert capabilities(folder).structured_output
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | {"decoder": decoder}))
    assert capabilities(folder).structured_output == bound


READ_AT_ONCE = """
import importlib, sys, threading
from pathlib import Path
from mlx_server import tokenizer_json

def read():
    together.wait()
    assert tokenizer_json.read_parts(Path(sys.argv[1])) is not None

sys.setswitchinterval(1e-6)
for _ in range(60):
    importlib.reload(tokenizer_json)  # as if nothing had been read before
    together = threading.Barrier(6)
    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_tokenizers_that_are_read_at_once_do_not_end_the_process(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-c", READ_AT_ONCE, str(folder)], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
