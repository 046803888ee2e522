"""Chat templates that behave as the published ones of each generation, and the tokens they use.

The texts are short, the forms are the published ones: roles, markers, what is refused, what is
dropped, what a missing variable means. `write_text_side` makes a folder that an adapter loads; in
`tests.support.tiny` the same names are families of whole models.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).parent
CHATML = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Published:
    """`special` begins with the end-of-turn token. `tools_file` is the template that transformers
    takes where tools are given. `edits` turn the file into a sibling's.
    """

    file: str
    model_type: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    tools_file: str | None = None
    edits: tuple[tuple[str, str], ...] = ()

    @property
    def source(self) -> str:
        """For `tokenizer_config.json`, but for a separate template for tools."""
        text = (FOLDER / f"{self.file}.jinja").read_text(encoding="utf-8").rstrip("\n")
        for old, new in self.edits:
            assert old in text, (self.file, old)
            text = text.replace(old, new)
        return text

    @property
    def chat_template(self) -> str | list[dict[str, str]]:
        if self.tools_file is None:
            return self.source
        tools = (FOLDER / f"{self.tools_file}.jinja").read_text(encoding="utf-8").rstrip("\n")
        return [
            {"name": "default", "template": self.source},
            {"name": "tool_use", "template": tools},
        ]


def _qwen(file: str, model_type: str, *plain: str) -> Published:
    return Published(file, model_type, ("<|im_end|>", "<|im_start|>", "<|endoftext|>"), plain)


def _gemma(file: str, model_type: str, *special: str) -> Published:
    turns = ("<end_of_turn>", "<start_of_turn>", "<eos>", "<bos>")
    return Published(file, model_type, (*turns, *special), bos="<bos>")


def _llama(file: str, model_type: str, *special: str) -> Published:
    ends = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|begin_of_text|>")
    return Published(file, model_type, (*ends, *special), bos="<|begin_of_text|>")


def _mistral(file: str, *special: str, edits: tuple[tuple[str, str], ...] = ()) -> Published:
    tools = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
    marks = ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", *tools)
    return Published(file, "mistral", (*marks, *special), bos="<s>", edits=edits)


def _glm(file: str, model_type: str) -> Published:
    roles = ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>")
    argument = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    special = (*roles, "<|endoftext|>", "[gMASK]", "<sop>")
    return Published(file, model_type, special, (*THINK, *CALL, *argument))


def _deepseek(
    file: str, plain: tuple[str, ...], edits: tuple[tuple[str, str], ...] = ()
) -> Published:
    sentence = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
    special = (*sentence, "<｜User｜>", "<｜Assistant｜>")
    return Published(file, "deepseek_v3", special, plain, bos=sentence[1], edits=edits)


def _granite(file: str, model_type: str, *plain: str) -> Published:
    return Published(
        file, model_type, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), plain
    )


def _kimi(*plain: str, edits: tuple[tuple[str, str], ...] = ()) -> Published:
    roles = ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
    section = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    call = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    return Published("kimi-k2", "kimi_k2", (*roles, *section, *call), plain, edits=edits)


SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
OUTPUTS = ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")
OUTPUT = ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
DEEPSEEK_CALLS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
COMMAND = (
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|>",
    "<BOS_TOKEN>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
COMMAND_BLOCKS = tuple(
    f"<|{edge}_{block}|>"
    for block in ("THINKING", "ACTION", "RESPONSE", "TOOL_RESULT")
    for edge in ("START", "END")
)

PUBLISHED: dict[str, Published] = {
    "qwen2.5": _qwen("qwen2.5", "qwen2", *CALL),
    "qwen3": _qwen("qwen3", "qwen3", *CALL, *THINK),
    "qwen3-coder": _qwen("qwen3-coder", "qwen3_moe", *CALL),
    "qwen3.5": _qwen("qwen3.5", "qwen3_5", *CALL, *THINK),
    "qwen3.5-small": Published(
        "qwen3.5",
        "qwen3_5",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        (*CALL, *THINK),
        edits=(("enable_thinking is defined and not enable_thinking", "not enable_thinking"),),
    ),
    "gemma2": _gemma("gemma2", "gemma2"),
    "gemma3": _gemma("gemma3", "gemma3_text"),
    "gemma4": Published(
        "gemma4",
        "gemma4_text",
        (
            *("<turn|>", "<|turn>", "<eos>", "<bos>", "<|think|>", "<|channel>", "<channel|>"),
            *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
            *("<|tool_response>", "<tool_response|>", '<|"|>'),
        ),
        bos="<bos>",
    ),
    "functiongemma": _gemma(
        "functiongemma",
        "gemma3_text",
        *("<start_function_declaration>", "<end_function_declaration>", "<escape>"),
        *("<start_function_call>", "<end_function_call>"),
        *("<start_function_response>", "<end_function_response>"),
    ),
    "llama3": _llama(
        "llama3", "llama", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"
    ),
    "llama4": Published(
        "llama4",
        "llama4_text",
        (
            *("<|eot|>", "<|eom|>", "<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>"),
            *("<|header_end|>", "<|python_start|>", "<|python_end|>"),
        ),
        bos="<|begin_of_text|>",
    ),
    "mistral-v3": _mistral("mistral-v3"),
    "mistral-nemo": _mistral("mistral-nemo"),
    "mistral-v7": _mistral("mistral-v7", *SYSTEM),
    "mistral-small3.2": _mistral(
        "mistral-small3.2", *SYSTEM, "[CALL_ID]", "[ARGS]", "[TOOL_CONTENT]"
    ),
    "magistral": _mistral(
        "mistral-small3.2",
        *SYSTEM,
        *("[CALL_ID]", "[ARGS]", "[TOOL_CONTENT]", "[THINK]", "[/THINK]"),
        edits=(("You are Mistral Small 3.", "Think in [THINK]your thoughts[/THINK] first."),),
    ),
    "devstral2": _mistral("devstral2", *SYSTEM, "[ARGS]"),
    "glm4.5": _glm("glm4.5", "glm4_moe"),
    "glm5": _glm("glm5", "glm_moe_dsa"),
    "deepseek-v3": _deepseek(
        "deepseek-r1",
        (*DEEPSEEK_CALLS, *OUTPUTS, *OUTPUT),
        (("<｜Assistant｜><think>\\n", "<｜Assistant｜>"),),
    ),
    "deepseek-r1": _deepseek("deepseek-r1", (*DEEPSEEK_CALLS, *OUTPUTS, *OUTPUT, *THINK)),
    "deepseek-v3.1": _deepseek("deepseek-v3.1", (*DEEPSEEK_CALLS, *OUTPUT, *THINK)),
    "deepseek-v3.2": _deepseek("deepseek-v3.2", ("｜DSML｜", *THINK)),
    "phi3.5": Published(
        "phi3.5", "phi3", ("<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
    ),
    "phi4": Published("phi4", "phi3", ("<|im_end|>", "<|im_start|>", "<|im_sep|>")),
    "phi4-mini": Published(
        "phi4-mini",
        "phi3",
        (
            *("<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
            *("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
        ),
    ),
    "granite3.3": _granite("granite3.3", "granite", "<|tool_call|>"),
    "granite4": _granite("granite4", "granitemoehybrid", *CALL),
    "lfm2": Published(
        "lfm2",
        "lfm2",
        (
            *("<|im_end|>", "<|im_start|>", "<|startoftext|>"),
            *("<|tool_list_start|>", "<|tool_list_end|>"),
            *("<|tool_call_start|>", "<|tool_call_end|>"),
            *("<|tool_response_start|>", "<|tool_response_end|>"),
        ),
        bos="<|startoftext|>",
    ),
    "lfm2.5": Published(
        "lfm2.5",
        "lfm2_moe",
        (
            *("<|im_end|>", "<|im_start|>", "<|startoftext|>"),
            *("<|tool_call_start|>", "<|tool_call_end|>"),
        ),
        THINK,
        bos="<|startoftext|>",
    ),
    "smollm3": Published("smollm3", "smollm3", ("<|im_end|>", "<|im_start|>"), (*THINK, *CALL)),
    "kimi-k2": _kimi(edits=(("message.role == 'assistant' %", "message.role == 'nobody' %"),)),
    "kimi-k2-thinking": _kimi(*THINK),
    "minimax-m2": Published(
        "minimax-m2",
        "minimax_m2",
        ("[e~[", "]~b]", "]~!b["),
        (*THINK, "<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    "nemotron-nano2": Published(
        "nemotron-nano2",
        "nemotron_h",
        ("<SPECIAL_12>", "<SPECIAL_10>", "<SPECIAL_11>"),
        (*THINK, "<TOOLCALL>", "</TOOLCALL>"),
    ),
    "nemotron3": Published("nemotron3", "nemotron_h", CHATML[::-1], (*THINK, *CALL)),
    "command-r": Published(
        "command-r", "cohere", COMMAND, bos="<BOS_TOKEN>", tools_file="command-r-tools"
    ),
    "command-r7b": Published(
        "command-r7b", "cohere2", (*COMMAND, *COMMAND_BLOCKS), bos="<BOS_TOKEN>"
    ),
    "seed-oss": Published(
        "seed-oss",
        "seed_oss",
        ("<seed:eos>", "<seed:bos>"),
        (
            *("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
            *("<seed:cot_budget_reflect>", "</seed:cot_budget_reflect>"),
        ),
    ),
    "hunyuan": Published(
        "hunyuan", "hunyuan", ("<|eos|>", "<|startoftext|>", "<|extra_0|>", "<|extra_4|>"), THINK
    ),
    "falcon-h1": Published(
        "falcon-h1", "falcon_h1", (*CHATML[::-1], "<|begin_of_text|>"), bos="<|begin_of_text|>"
    ),
    "parts": Published("parts", "smolvlm", ("<end_of_utterance>",)),
}
"""`parts` is for content that is a list of parts, as templates of vision models want it."""


def write_text_side(folder: Path, name: str) -> Path:
    """Write what an adapter needs to `folder`, without weights: a byte-level tokenizer."""
    kind = PUBLISHED[name]
    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for tokens, special in ((kind.special, True), (kind.plain, False)):
        added = [AddedToken(one, special=special, normalized=False) for one in tokens]
        tokenizer.add_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": kind.model_type},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": kind.bos,
            "eos_token": kind.special[0],
            "clean_up_tokenization_spaces": False,
            "chat_template": kind.chat_template,
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder
