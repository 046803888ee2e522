"""Adapters over real tokenizers: prompts to the letter, stop tokens as exact sets, refusals."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlx_server.errors import BadRequest, ModelLoadFailed
from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import find_family, load_adapter
from mlx_server.models.text.syntax import Reasoning
from mlx_server.schemas.internal import ChatPrompt, TextPrompt
from tests.support.tiny import FAMILIES, build_tiny_model, token_id

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
    ids = prompt_tokens(adapter, ChatPrompt(list(messages), **options))
    return adapter.tokenizer.backend.decode(ids, skip_special_tokens=False)


def prompt_tokens(adapter: Adapter, prompt: ChatPrompt) -> list[int]:
    return adapter.prepare(prompt, None).tokens


def names(adapter: Adapter, tokens: frozenset[int]) -> set[str]:
    return {adapter.tokenizer.token_name(token) for token in tokens}


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
    bos = token_id(adapter.tokenizer.backend, str(FAMILIES[family].bos))
    assert prompt_tokens(adapter, ChatPrompt([user("Hi")])).count(bos) == 1


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
        load("llama").prepare(ChatPrompt(messages, continue_final=True), None)
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
        load("llama").prepare(ChatPrompt([user("Hi")], template_kwargs={option: "x"}), None)
    assert refusal.value.param == "chat_template_kwargs"


# refusals


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("gemma", [{"role": "judge", "content": "Guilty."}], "must alternate"),
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
        load(family).prepare(ChatPrompt(messages), None)
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
        load("llama", template=template).prepare(ChatPrompt([user("Hi")]), None)


def test_a_model_without_a_template_points_to_completions(load: Load) -> None:
    adapter = load("llama", template=None)
    with pytest.raises(BadRequest, match="/v1/completions"):
        adapter.prepare(ChatPrompt([user("Hi")]), None)
    assert adapter.prepare(TextPrompt("Hi"), None).tokens


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
    assert gemma.tokenizer.token_id("<unk>") is not None
    assert names(gemma, gemma.stop_tokens) == {"<eos>"}
    llama = load("llama", omit_tokens=("<|eom_id|>", "<|python_tag|>"))
    assert names(llama, llama.stop_tokens) == {"<|end_of_text|>", "<|eot_id|>"}


@pytest.mark.parametrize(("value", "expected"), [(7, {7}), ([7], {7}), ([7, 9], {7, 9})])
def test_stop_tokens_include_those_of_all_configs(
    tmp_path: Path, value: Any, expected: set[int]
) -> None:
    build_tiny_model(tmp_path, "generic")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"eos_token_id": 5, "text_config": {"eos_token_id": 6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    adapter = load_adapter(tmp_path, "x")
    assert adapter.stop_tokens == {5, 6, adapter.tokenizer.token_id("<|endoftext|>")} | expected


def test_a_model_needs_no_generation_config(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama")
    (tmp_path / "generation_config.json").unlink()
    adapter = load_adapter(tmp_path, "x")
    assert names(adapter, adapter.stop_tokens) == STOPS["llama"]


# syntax


@pytest.mark.parametrize(
    ("family", "style", "reasoning"),
    [
        ("llama", "llama", False),
        ("qwen", "hermes", True),
        ("mistral", "generic", False),
        ("gemma", "generic", False),
        ("phi", "generic", False),
        ("generic", "generic", False),
        ("mistral-headers", "mistral-headers", True),
        ("gemma-tools", "gemma", True),
    ],
)
def test_the_syntax_is_found_in_the_files(
    load: Load, family: str, style: str, reasoning: bool
) -> None:
    adapter = load(family)
    assert adapter.style is not None
    assert adapter.style.name == style
    assert adapter.syntax.calls == adapter.style.syntax
    assert (adapter.syntax.reasoning is not None) is reasoning


@pytest.mark.parametrize("family", [*FAMILIES, "mistral-headers", "gemma-tools"])
def test_a_template_shows_system_messages_or_is_known_not_to(load: Load, family: str) -> None:
    assert load(family)._fitting.plain.shows_system is (family != "gemma")


@pytest.mark.parametrize(
    ("shown", "style"),
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
        ("tools <arg_key>", "glm"),
        ("tools", "generic"),
        ("<tool_call>", "generic"),
        ("", "generic"),
    ],
)
def test_the_template_tells_how_calls_are_written(load: Load, shown: str, style: str) -> None:
    adapter = load("generic", template=f"{{#- {shown} -#}}{{{{ messages[0].content }}}}")
    assert adapter.style is not None
    assert adapter.style.name == style


@pytest.mark.parametrize(
    ("tokens", "style"),
    [
        (["<|tool_call_start|>", "<|tool_call_end|>"], "lfm2"),
        (["｜DSML｜"], "deepseek-markup"),
        ([], "generic"),
    ],
)
def test_the_vocabulary_tells_how_calls_are_written(
    load: Load, tokens: list[str], style: str
) -> None:
    template = "{#- tools -#}{{ messages[0].content }}"
    adapter = load("generic", template=template, extra_tokens=tokens)
    assert adapter.style is not None
    assert adapter.style.name == style


@pytest.mark.parametrize(
    ("shown", "markers"),
    [
        ("<think></think>", Reasoning("<think>", "</think>")),
        ("<seed:think></seed:think>", Reasoning("<seed:think>", "</seed:think>")),
        (
            "<|START_THINKING|><|END_THINKING|>",
            Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
        ),
        ("<|inner_prefix|><|inner_suffix|>", Reasoning("<|inner_prefix|>", "<|inner_suffix|>")),
        ("an AI math expert developed by Microsoft", Reasoning("<think>", "</think>")),
        ("<think>", None),
        ("", None),
    ],
)
def test_the_template_tells_how_a_model_thinks(
    load: Load, shown: str, markers: Reasoning | None
) -> None:
    adapter = load("generic", template=f"{{#- {shown} -#}}{{{{ messages[0].content }}}}")
    assert adapter.syntax.reasoning == markers


@pytest.mark.parametrize(
    ("tokens", "markers"),
    [
        (["<|channel>", "<channel|>"], Reasoning("<|channel>thought", "<channel|>")),
        (
            ["<|think|>", "<|end|>", "<|begin|>"],
            Reasoning("<|think|>", "<|end|><|begin|>assistant"),
        ),
        (["<seed:think>", "</seed:think>"], Reasoning("<seed:think>", "</seed:think>")),
        (["<|think|>"], None),
    ],
)
def test_the_vocabulary_tells_how_a_model_thinks(
    load: Load, tokens: list[str], markers: Reasoning | None
) -> None:
    adapter = load("generic", extra_tokens=tokens)
    assert adapter.syntax.reasoning == markers


# threads


def test_threads_can_share_an_adapter(load: Load) -> None:
    adapter = load("llama")
    prompts = [ChatPrompt([user(f"{text} {i}" * 20)]) for i in range(25) for text in SAMPLES]
    expected = [prompt_tokens(adapter, prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(partial(prompt_tokens, adapter), prompts)) == expected


# broken folders


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
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
    if harmless:
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
