"""Chat templates that write tool calls as the published ones of each syntax do."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.adapters.registry import load_adapter
from tests.support.tiny import tiny_tokenizer

START, END = "[assistant]", "[end]"
FRAME = (
    "{%- macro json(c) -%}"
    '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}'
    "{%- endmacro -%}"
    "{%- macro value(v) -%}{{ v if v is string else v | tojson }}{%- endmacro -%}"
    "{%- if tools -%}{{ tools | tojson }}{%- endif -%}"
    "{#- HINT -#}"
    "{%- for m in messages -%}{{ '[' + m.role + ']' }}{{ m.content or '' }}"
    "{%- set calls = (m.tool_calls or []) | map(attribute='function') | list -%}"
    "{%- if calls %}CALLS{% endif -%}{{ '[end]' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]' }}{%- endif -%}"
)
EACH = "{% for c in calls %}"
PAIRS = "{% for k, v in c.arguments.items() %}"
DONE = "{% endfor %}"
COMMA = "{{ ', ' if not loop.last else '' }}"
NEWLINE = "{{ '\\n' if not loop.last else '' }}"
LIST = f"[{EACH}{{{{ json(c) }}}}{COMMA}{DONE}]"
PYTHON_VALUE = "{{ v | string if v is boolean else v | tojson }}"
PYTHON = f"{{{{ c.name }}}}({PAIRS}{{{{ k }}}}={PYTHON_VALUE}{COMMA}{DONE})"


@dataclass(frozen=True)
class Written:
    """`hint` comes with the tools, `calls` after an assistant's text. `parallel`: of several calls
    all are written.
    """

    calls: str
    tokens: tuple[str, ...] = ()
    hint: str = ""
    parallel: bool = True


def _each(call: str, between: str = "") -> str:
    return f"{EACH}{call}{between}{DONE}{{{{ '' }}}}"


def _pairs(pair: str) -> str:
    return f"{PAIRS}{pair}{DONE}{{{{ '' }}}}"


def _markup(token: str, block: str) -> Written:
    kind = '{{ "true" if v is string else "false" }}'
    pair = (
        f'<{token}parameter name="{{{{ k }}}}" string="{kind}">'
        f"{{{{ value(v) }}}}</{token}parameter>{{{{ '\\n' }}}}"
    )
    head = f"{{{{ '\\n' }}}}<{token}invoke name=\"{{{{ c.name }}}}\">{{{{ '\\n' }}}}"
    call = f"{head}{_pairs(pair)}</{token}invoke>"
    return Written(f"<{token}{block}>{_each(call)}\n</{token}{block}>", (token,))


def _glm(prefix: str, gap: str) -> Written:
    pair = (
        f"<{prefix}arg_key>{{{{ k }}}}</{prefix}arg_key>{gap}<{prefix}arg_value>"
        f"{{{{ value(v) }}}}</{prefix}arg_value>{{{{ GAP }}}}"
    ).replace("GAP", repr(gap))
    call = f"<{prefix}tool_call>{{{{ c.name }}}}{{{{ GAP }}}}{_pairs(pair)}</{prefix}tool_call>"
    return Written(_each(call.replace("GAP", repr(gap)), NEWLINE), ("<arg_key>", "</arg_value>"))


def _braces(start: str, end: str, escape: str) -> Written:
    other = "(v | tojson | replace(', ', ','))"
    text = f"{{{{ {escape!r} + v + {escape!r} if v is string else {other} }}}}"
    pair = f"{{{{ k }}}}:{text}{{{{ ',' if not loop.last else '' }}}}"
    inside = "{{ c.name + '{' }}" + _pairs(pair) + "{{ '}' }}"
    return Written(_each(f"{start}call:{inside}{end}"), (start, end, escape))


DEEPSEEK_TOKENS = tuple(
    f"<｜tool▁{one}｜>" for one in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
WRITTEN = {
    "hermes": Written(
        _each("<tool_call>\n{{ json(c) }}\n</tool_call>", NEWLINE),
    ),
    "exaone": Written(
        _each("<tool_call>{{ json(c) }}</tool_call>", NEWLINE),
        hint='<tool_call>{"name": function_name, "arguments": {...}}</tool_call>',
    ),
    "falcon": Written(
        f"<tool_call>\n{LIST}\n</tool_call>", hint="<tool_call>\n[\n  {...}\n]\n</tool_call>"
    ),
    "llama": Written(
        _each('{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'),
        ("<|python_tag|>",),
        hint="<|python_tag|>",
        parallel=False,
    ),
    "llama-bare": Written(
        _each('{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'),
        ("<|python_start|>", "<|python_end|>"),
        parallel=False,
    ),
    "xlam": Written(LIST, hint="make calls in a single JSON array"),
    "phi": Written(f"<|tool_call|>{LIST}<|/tool_call|>", ("<|tool_call|>", "<|/tool_call|>")),
    "functools": Written(f"functools{LIST}"),
    "granite": Written(f"<|tool_call|>{LIST}", ("<|tool_call|>",), hint="<|start_of_role|>"),
    "mistral": Written(f"[TOOL_CALLS]{LIST}", ("[TOOL_CALLS]",)),
    "nemotron": Written(f"<TOOLCALL>{LIST}</TOOLCALL>"),
    "tool-calls": Written(f"<tool_calls>{LIST}</tool_calls>"),
    "minimax-m1": Written(
        f"<tool_calls>\n{_each('{{ json(c) }}', NEWLINE)}\n</tool_calls>",
        hint='<tool_calls>\n{"name": <tool-name>, "arguments": <args-json-object>}\n</tool_calls>',
    ),
    "internlm": Written(
        _each("<|action_start|><|plugin|>\n{{ json(c) }}<|action_end|>"),
        ("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    ),
    "gigachat": Written(
        "function call<|role_sep|>\n{{ json(calls[0]) }}", ("<|role_sep|>",), parallel=False
    ),
    "command": Written(
        "<|START_ACTION|>{{ '[\\n    ' }}"
        + _each(
            '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.name }}", '
            '"parameters": {{ c.arguments | tojson }}}',
            "{{ ',\\n    ' if not loop.last else '' }}",
        )
        + "\n]<|END_ACTION|>",
        ("<|START_ACTION|>", "<|END_ACTION|>"),
    ),
    "command-r": Written(
        "Action: ```json{{ '\\n[\\n    ' }}"
        + _each(
            '{\n        "tool_name": "{{ c.name }}",\n'
            '        "parameters": {{ c.arguments | tojson }}\n    }',
            "{{ ',\\n    ' if not loop.last else '' }}",
        )
        + "\n]```",
    ),
    "apertus": Written(
        "<|tools_prefix|>["
        + _each('{"{{ c.name }}": {{ c.arguments | tojson }}}', COMMA)
        + "]<|tools_suffix|>",
        ("<|tools_prefix|>", "<|tools_suffix|>"),
    ),
    "mistral-headers": Written(
        _each("[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}"),
        ("[TOOL_CALLS]", "[ARGS]"),
    ),
    "mistral-ids": Written(
        _each("[TOOL_CALLS]{{ c.name }}[CALL_ID]Zx3w5v7u9[ARGS]{{ c.arguments | tojson }}"),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    "kimi": Written(
        "<|tool_calls_section_begin|>"
        + _each(
            "<|tool_call_begin|>functions.{{ c.name }}:{{ loop.index0 }}"
            "<|tool_call_argument_begin|>{{ c.arguments | tojson }}<|tool_call_end|>"
        )
        + "<|tool_calls_section_end|>",
        (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
    ),
    "deepseek": Written(
        "<｜tool▁calls▁begin｜>"
        + _each(
            "<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>{{ c.arguments | tojson }}"
            "<｜tool▁call▁end｜>"
        )
        + "<｜tool▁calls▁end｜>",
        DEEPSEEK_TOKENS,
    ),
    "deepseek-fenced": Written(
        "<｜tool▁calls▁begin｜>"
        + _each(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.name }}\n```json\n"
            "{{ c.arguments | tojson }}\n```<｜tool▁call▁end｜>",
            NEWLINE,
        )
        + "<｜tool▁calls▁end｜>",
        DEEPSEEK_TOKENS,
    ),
    "deepseek-markup": _markup("｜DSML｜", "function_calls"),
    "deepseek-tool-calls": _markup("｜DSML｜", "tool_calls"),
    "gigachat-markup": _markup("｜GCML｜", "tool_calls"),
    "hunyuan": Written(
        "<tool_calls>\n"
        + _each(
            "<tool_call>{{ c.name }}\n```json\n{{ c.arguments | tojson }}\n```\n</tool_call>",
            NEWLINE,
        )
        + "\n</tool_calls>",
    ),
    "solar": Written(
        "<|tool_calls|>"
        + _each(
            "<|tool_call:begin|>{{ loop.index0 }}<|tool_call:name|>{{ c.name }}"
            "<|tool_call:args|>{{ c.arguments | tojson }}<|tool_call:end|>"
        )
        + "<|calls|>",
        (
            *("<|tool_calls|>", "<|calls|>", "<|tool_call:begin|>", "<|tool_call:name|>"),
            *("<|tool_call:args|>", "<|tool_call:end|>"),
        ),
    ),
    "functionary": Written(
        _each("<function={{ c.name }}>{{ c.arguments | tojson }}</function>"),
    ),
    "lfm2": Written(
        f"<|tool_call_start|>[{_each(PYTHON, COMMA)}]<|tool_call_end|>",
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "pythonic": Written(
        f"[{_each(PYTHON, COMMA)}]",
        ("<|python_start|>", "<|python_end|>"),
        hint="[func_name1(param1=value1, param2=value2), func_name2(...)]",
    ),
    "olmo": Written(f"<function_calls>\n{_each(PYTHON, NEWLINE)}\n</function_calls>"),
    "gemma": _braces("<|tool_call>", "<tool_call|>", '<|"|>'),
    "function-gemma": _braces("<start_function_call>", "<end_function_call>", "<escape>"),
    "qwen-coder": Written(
        _each(
            "<tool_call>\n<function={{ c.name }}>\n"
            + _pairs("<parameter={{ k }}>\n{{ value(v) }}\n</parameter>{{ '\\n' }}")
            + "</function>\n</tool_call>",
            NEWLINE,
        ),
    ),
    "seed": Written(
        _each(
            "<seed:tool_call>\n<function={{ c.name }}>\n"
            + _pairs("<parameter={{ k }}>{{ value(v) }}</parameter>{{ '\\n' }}")
            + "</function>\n</seed:tool_call>",
            NEWLINE,
        ),
        ("<seed:tool_call>", "</seed:tool_call>"),
    ),
    "minimax": Written(
        "<minimax:tool_call>\n"
        + _each(
            '<invoke name="{{ c.name }}">\n'
            + _pairs("<parameter name=\"{{ k }}\">{{ value(v) }}</parameter>{{ '\\n' }}")
            + "</invoke>",
            NEWLINE,
        )
        + "\n</minimax:tool_call>",
    ),
    "minicpm": Written(
        _each(
            '<function name="{{ c.name }}">'
            + _pairs('<param name="{{ k }}">{{ value(v) }}</param>')
            + "</function>"
        ),
    ),
    "glm-lines": _glm("", "\n"),
    "glm": _glm("", ""),
    "longcat": _glm("longcat_", "\n"),
}
"""By the style's name."""


def calling_adapter(folder: Path, style: str) -> Adapter:
    written = WRITTEN[style]
    template = FRAME.replace("HINT", written.hint).replace("CALLS", written.calls)
    tokenizer = Tokenizer.from_str(tiny_tokenizer("generic").to_str())
    tokenizer.add_special_tokens(list(written.tokens))
    config = {"eos_token": "<|endoftext|>", "chat_template": template}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "any", "eos_token_id": 0}')
    return load_adapter(folder, "tiny")
