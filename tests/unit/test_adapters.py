"""Adapters over real tokenizers: prompts to the letter, stop tokens as exact sets, refusals."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from mlx_server.errors import BadRequest, ModelLoadFailed
from mlx_server.models.text.adapters.base import Adapter, Capabilities, Reasoning
from mlx_server.models.text.adapters.registry import find_family, load_adapter
from mlx_server.models.text.adapters.token_bytes import TokenBytes
from mlx_server.schemas.internal import ChatPrompt
from tests.support.tiny import FAMILIES, build_tiny_model, tiny_tokenizer, token_id

SAMPLES = [
    "Hello, world!",
    " leading and  double spaces\n\n\ttabs ",
    "naïve café 日本語 Привет 🦙👩‍👩‍👧 ▁",
    '{"a": [1, 2.5, null]}',
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

Load = Callable[..., Adapter]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Build a tiny model with the given extras and load its adapter, once per combination."""
    loaded: dict[str, Adapter] = {}

    def load_tiny(family: str, **extras: Any) -> Adapter:
        key = f"{family}{extras}"
        if key not in loaded:
            folder = build_tiny_model(tmp_path_factory.mktemp(family), family, **extras)
            loaded[key] = load_adapter(folder, f"test/tiny-{family}")
        return loaded[key]

    return load_tiny


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def rendered(adapter: Adapter, *messages: dict[str, Any], **options: Any) -> str:
    ids = adapter.render(ChatPrompt(list(messages), **options))
    return adapter.tokenizer.decode(ids, skip_special_tokens=False)


def names(adapter: Adapter, tokens: frozenset[int]) -> set[str]:
    return {adapter.token_name(token) for token in tokens}


# families


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_decides_the_family(load: Load, family: str) -> None:
    assert load(family).family == family


@pytest.mark.parametrize(
    ("model_type", "name", "family"),
    [
        ("llama", "org/Qwen-distilled", "llama"),
        ("llama4_text", "x", "llama"),
        ("qwen3_moe", "x", "qwen"),
        ("qwen2_vl", "x", "qwen"),
        ("mixtral", "x", "mistral"),
        ("ministral3", "x", "mistral"),
        ("gemma3n", "x", "gemma"),
        ("phimoe", "x", "phi"),
        ("brand_new", "mlx-community/Qwen9-7B-4bit", "qwen"),
        ("", "Llama-3.2-1B", "llama"),
        (None, "/models/Phi-3.5-mini/", "phi"),
        ("", "microsoft/phi4", "phi"),
        ("", "Magistral-Small", "mistral"),
        ("stablelm", "qwen-lovers/stablelm-2", "generic"),
        ("olmo2", "dolphin-7b", "generic"),
    ],
)
def test_the_name_decides_only_what_the_config_does_not(
    model_type: str | None, name: str, family: str
) -> None:
    assert find_family({"model_type": model_type}, name).family == family


# prompts

PROMPTS = {
    "llama": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi 🦙<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>user\nHi 🦙<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST]  Hi 🦙 [/INST]",
    "gemma": "<bos><start_of_turn>user\nHi 🦙<end_of_turn>\n<start_of_turn>model\n",
    "phi": "<|user|>\nHi 🦙<|end|>\n<|assistant|>\n",
    "generic": "<|user|>\nHi 🦙<|endoftext|>\n<|assistant|>\n",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_the_models_template_makes_of_it(load: Load, family: str) -> None:
    # Mistral's second space is the tokenizer's: it puts one in front of text after a special token.
    assert rendered(load(family), user("Hi 🦙")) == PROMPTS[family]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_a_prompt_begins_with_one_beginning_of_text(load: Load, family: str) -> None:
    adapter = load(family)
    bos = token_id(adapter.tokenizer, str(FAMILIES[family].bos))
    assert adapter.render(ChatPrompt([user("Hi")])).count(bos) == 1


def test_a_conversation_keeps_its_order_and_roles(load: Load) -> None:
    messages = [system("Be brief."), user("Hi"), assistant("Hello"), user("Bye")]
    assert rendered(load("llama"), *messages) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    ("family", "ending"),
    [
        ("llama", "<|start_header_id|>assistant<|end_header_id|>\n\nThe answer is"),
        ("qwen", "<|im_start|>assistant\nThe answer is"),
        ("gemma", "<start_of_turn>model\nThe answer is"),
        ("phi", "<|assistant|>\nThe answer is"),
        ("mistral", "[/INST]  The answer is"),
    ],
)
def test_a_prefilled_answer_is_left_open(load: Load, family: str, ending: str) -> None:
    messages = [user("What?"), assistant("The answer is")]
    text = rendered(load(family), *messages, continue_final=True)
    assert text.endswith(ending)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [user("Hi")],
        [user("Hi"), {"role": "assistant", "content": None}],
        [user("Hi"), {"role": "assistant"}],
    ],
)
def test_only_an_assistants_text_can_be_continued(
    load: Load, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(BadRequest) as refusal:
        load("llama").render(ChatPrompt(messages, continue_final=True))
    assert refusal.value.param == "messages"


def test_tools_and_template_options_reach_the_template(load: Load) -> None:
    text = rendered(
        load("qwen"), user("Hi"), tools=TOOLS, template_kwargs={"enable_thinking": False}
    )
    assert '"name": "weather"' in text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("option", ["chat_template", "tokenize", "tools", "tokenizer_kwargs"])
def test_template_options_cannot_replace_the_template_or_its_inputs(
    load: Load, option: str
) -> None:
    with pytest.raises(BadRequest, match=option) as refusal:
        load("llama").render(ChatPrompt([user("Hi")], template_kwargs={option: "x"}))
    assert refusal.value.param == "chat_template_kwargs"


# refusals


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("gemma", [system("Be brief."), user("Hi")], "System role not supported"),
        ("gemma", [user("Hi"), user("Hello?")], "must alternate"),
        ("mistral", [user("Hi"), user("Hello?")], "must alternate"),
        ("mistral", [assistant("Hi")], "must alternate"),
        ("phi", [{"role": "user"}], "content"),
        ("llama", [{"content": "Hi"}], "role"),
        ("phi", [{"role": "user", "content": {"a": 1}}], "concatenate"),
        ("llama", [], "."),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(
    load: Load, family: str, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason) as refusal:
        load(family).render(ChatPrompt(messages))
    assert refusal.value.param == "messages"
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages.missing.attribute }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for %}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_not_a_server_error(load: Load, template: str) -> None:
    with pytest.raises(BadRequest):
        load("llama", template=template).render(ChatPrompt([user("Hi")]))


def test_a_model_without_a_template_points_to_completions(load: Load) -> None:
    adapter = load("llama", template=None)
    assert not adapter.capabilities.chat
    with pytest.raises(BadRequest, match="/v1/completions"):
        adapter.render(ChatPrompt([user("Hi")]))
    assert adapter.encode("Hi")


# stop tokens

STOPS = {
    "llama": {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"},
    "qwen": {"<|im_end|>", "<|endoftext|>"},
    "mistral": {"</s>"},
    "gemma": {"<eos>", "<end_of_turn>"},
    "phi": {"<|end|>", "<|endoftext|>"},
    "generic": {"<|endoftext|>"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_tokens_are_exactly_the_familys(load: Load, family: str) -> None:
    adapter = load(family)
    assert names(adapter, adapter.stop_tokens) == STOPS[family]


def test_a_token_that_the_vocabulary_lacks_is_no_stop_token(load: Load) -> None:
    gemma = load("gemma", omit_tokens=("<end_of_turn>",), template=None)
    assert gemma.tokenizer.token_to_id("<unk>") is not None
    assert names(gemma, gemma.stop_tokens) == {"<eos>"}
    llama = load("llama", omit_tokens=("<|eom_id|>", "<|python_tag|>"))
    assert names(llama, llama.stop_tokens) == {"<|end_of_text|>", "<|eot_id|>"}


@pytest.mark.parametrize("value", [7, [7], [7, 9]])
def test_stop_tokens_include_those_of_both_configs(tmp_path: Path, value: Any) -> None:
    build_tiny_model(tmp_path, "generic")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    adapter = load_adapter(tmp_path, "x")
    own = adapter.tokenizer.token_to_id("<|endoftext|>")
    assert adapter.stop_tokens == {5, own} | ({value} if isinstance(value, int) else set(value))


def test_a_model_needs_no_generation_config(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama")
    (tmp_path / "generation_config.json").unlink()
    adapter = load_adapter(tmp_path, "x")
    assert names(adapter, adapter.stop_tokens) == STOPS["llama"]


# capabilities


@pytest.mark.parametrize(
    ("family", "tool_syntax", "reasoning", "system_role"),
    [
        ("llama", "llama", False, True),
        ("qwen", "hermes", True, True),
        ("mistral", "generic", False, True),
        ("gemma", "generic", False, False),
        ("phi", "generic", False, True),
        ("generic", "generic", False, True),
        ("mistral-headers", "mistral-headers", True, True),
        ("gemma-tools", "gemma", True, True),
    ],
)
def test_capabilities_are_read_from_the_files(
    load: Load, family: str, tool_syntax: str, reasoning: bool, system_role: bool
) -> None:
    assert load(family).capabilities == Capabilities(
        chat=True,
        tools=True,
        reasoning=reasoning,
        system_role=system_role,
        tool_syntax=tool_syntax,
    )


@pytest.mark.parametrize(
    ("shown", "tool_syntax"),
    [
        ("tools <tool_call> tool_call.name", "hermes"),
        ("tools <tool_call>", "hermes"),
        ("tools <tool_call>\n<function=", "qwen-coder"),
        ("tools [TOOL_CALLS]", "mistral"),
        ("tools [TOOL_CALLS][ARGS]", "mistral-headers"),
        ("tools <|tool_call>call:<tool_call|>", "gemma"),
        ("tools <start_function_call>", "function-gemma"),
        ("tools <|tool|>", "phi"),
        ("tools <|python_tag|>", "llama"),
        ("tools <|tool_calls_section_begin|>", "kimi"),
        ("tools <arg_key>", "glm47"),
        ("tools", "generic"),
        ("<tool_call>", "generic"),
        ("", "generic"),
    ],
)
def test_the_template_tells_how_calls_are_written(load: Load, shown: str, tool_syntax: str) -> None:
    adapter = load("generic", template=f"{{#- {shown} -#}}{{{{ messages[0].content }}}}")
    assert adapter.capabilities.tool_syntax == tool_syntax


@pytest.mark.parametrize(
    ("shown", "markers"),
    [("<think></think>", Reasoning("<think>", "</think>")), ("<think>", None), ("", None)],
)
def test_the_template_tells_how_a_model_thinks(
    load: Load, shown: str, markers: Reasoning | None
) -> None:
    adapter = load("generic", template=f"{{#- {shown} -#}}{{{{ messages[0].content }}}}")
    assert adapter.syntax.reasoning == markers
    assert adapter.capabilities.reasoning is (markers is not None)


# text and tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", SAMPLES)
def test_the_bytes_of_tokens_join_to_their_text(load: Load, family: str, text: str) -> None:
    adapter = load(family)
    ids = adapter.encode(text)
    # SentencePiece puts a space in front of a text.
    space = " " if family == "mistral" else ""
    expected = (space + text.replace("▁", " " if family in ("mistral", "gemma") else "▁")).encode()
    assert b"".join(map(adapter.token_bytes, ids)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_adds_its_bytes_to_a_text(load: Load, family: str) -> None:
    adapter = load(family)
    before = adapter.tokenizer.encode("a", add_special_tokens=False).ids
    start = adapter.decode(before)
    for token in range(adapter.tokenizer.get_vocab_size()):
        expected = adapter.decode([*before, token]).removeprefix(start)
        assert adapter.token_bytes(token).decode(errors="replace") == expected, token


@pytest.mark.parametrize("family", FAMILIES)
def test_all_256_bytes_can_be_said(load: Load, family: str) -> None:
    adapter = load(family)
    said = {adapter.token_bytes(token) for token in range(adapter.tokenizer.get_vocab_size())}
    assert {bytes([value]) for value in range(256)} - said <= {b" "}


def test_special_and_unknown_tokens_have_no_bytes_and_others_do(load: Load) -> None:
    adapter = load("qwen")
    ids = {name: token_id(adapter.tokenizer, name) for name in ("<|im_end|>", "<think>")}
    assert adapter.token_bytes(ids["<|im_end|>"]) == b""
    assert adapter.token_bytes(ids["<think>"]) == b"<think>"
    assert adapter.token_bytes(adapter.tokenizer.get_vocab_size() + 7) == b""
    assert adapter.token_name(ids["<|im_end|>"]) == "<|im_end|>"


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
    load: Load, family: str
) -> None:
    adapter = load(family)
    bos = str(FAMILIES[family].bos)
    bos_id = token_id(adapter.tokenizer, bos)
    assert adapter.encode("Hello")[0] == bos_id
    assert adapter.encode(bos + "Hello").count(bos_id) == 1
    assert adapter.encode("") == [bos_id]


@pytest.mark.parametrize("family", ["qwen", "phi", "generic"])
def test_a_tokenizer_without_a_beginning_of_text_adds_none(load: Load, family: str) -> None:
    adapter = load(family)
    assert adapter.encode("Hello") == tiny_tokenizer(family).encode("Hello").ids
    assert adapter.encode("") == []


def test_a_truncation_left_in_the_file_cuts_no_prompt(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    adapter = load_adapter(tmp_path, "x")
    assert adapter.decode(adapter.encode(SAMPLES[0])) == SAMPLES[0]
    assert 4 < len(adapter.encode(SAMPLES[0])) < 64


def test_threads_can_share_an_adapter(load: Load) -> None:
    adapter = load("llama")
    prompts = [ChatPrompt([user(f"{text} {i}" * 20)]) for i in range(25) for text in SAMPLES]
    expected = [adapter.render(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(adapter.render, prompts)) == expected


# broken folders


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', None])
def test_a_broken_folder_is_a_clear_load_failure(
    tmp_path: Path, file: str, content: str | None
) -> None:
    build_tiny_model(tmp_path, "llama")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    harmless = file != "tokenizer.json" and content is not None and content.startswith('{"')
    if harmless or (file == "generation_config.json" and content is None):
        load_adapter(tmp_path, "x")
        return
    with pytest.raises(ModelLoadFailed, match="tokenizer" if "tok" in file else file) as failure:
        load_adapter(tmp_path, "x")
    assert "\n" not in failure.value.message


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the model was run')")
    with pytest.raises(ModelLoadFailed, match="trust_remote_code"):
        load_adapter(tmp_path, "x")


def test_loading_prints_nothing(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "phi")
    code = (
        "import sys; from pathlib import Path\n"
        "from mlx_server.models.text.adapters.registry import load_adapter\n"
        "assert 'transformers' not in sys.modules\n"
        "load_adapter(Path(sys.argv[1]), 'x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
