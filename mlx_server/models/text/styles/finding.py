"""Which style of calls a model has."""

import re
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from mlx_server.models.text.styles import headed_calls as headed
from mlx_server.models.text.styles import json_calls as objects
from mlx_server.models.text.styles import tagged_calls as tagged
from mlx_server.models.text.syntax import CallStyle, CallSyntax

TOOLS = re.compile(r"\btools\b")
ESCAPES = {"\\n": "\n", '\\"': '"', "\\'": "'"}
ESCAPE = re.compile(r"\\[n\"']")

KNOWN = (
    *(tagged.DEEPSEEK_TOOL_CALLS, tagged.DEEPSEEK_MARKUP, tagged.GIGACHAT_MARKUP),
    *(headed.DEEPSEEK_FENCED, headed.DEEPSEEK),
    *(tagged.MINIMAX, tagged.SEED, tagged.LONGCAT, tagged.GLM_LINES, tagged.GLM),
    *(headed.GEMMA, headed.FUNCTION_GEMMA, headed.KIMI, headed.SOLAR),
    *(headed.LFM2, headed.LFM2_LISTS, headed.OLMO, headed.PYTHONIC),
    *(objects.APERTUS, objects.COMMAND, objects.COMMAND_R, objects.INTERNLM),
    *(objects.NEMOTRON, objects.GIGACHAT, objects.FUNCTOOLS),
    *(tagged.QWEN_CODER, tagged.MINICPM, headed.FUNCTIONARY),
    *(headed.MISTRAL_IDS, headed.MISTRAL_HEADERS, objects.MISTRAL),
    *(objects.GRANITE, objects.PHI, objects.PHI_TOOLS),
    *(headed.HUNYUAN, objects.MINIMAX_M1, objects.TOOL_CALLS),
    *(objects.XLAM, objects.EXAONE, objects.FALCON, objects.HERMES),
    *(tagged.DEEPSEEK_MARKUP_TOKENS, headed.LFM2_TOKENS),
)
"""The first that fits is the model's: those with more signs come before those with fewer."""
LAST = (objects.LLAMA, objects.LLAMA_BARE)
"""Whose signs other templates hold too."""
BY_PARSER = {
    "function_gemma": headed.FUNCTION_GEMMA,
    "gemma4": headed.GEMMA,
    "glm47": tagged.GLM,
    "json_tools": objects.HERMES,
    "kimi_k2": headed.KIMI,
    "laguna": tagged.GLM,
    "longcat": tagged.LONGCAT,
    "minicpm5": tagged.MINICPM,
    "minimax_m2": tagged.MINIMAX,
    "mistral": objects.MISTRAL,
    "pythonic": headed.LFM2,
    "qwen3_coder": tagged.QWEN_CODER,
}
"""By the name that mlx-lm has for it."""


def find_call_style(
    vocabulary: Container[str],
    template: str | None,
    mlx_lm_style: Callable[[], CallStyle | None],
    fallback: CallStyle | None,
) -> CallStyle | None:
    """None without a chat template, which is "" if it is a program. `fallback` is for templates
    that render tools but no calls.
    """
    if template is None:
        return None
    if template and not TOOLS.search(template):
        return objects.GENERIC
    text = ESCAPE.sub(lambda escape: ESCAPES[escape[0]], template)
    return (
        _first(KNOWN, vocabulary, text)
        or mlx_lm_style()
        or _first(LAST, vocabulary, text)
        or fallback
        or objects.GENERIC
    )


def _first(
    styles: tuple[CallStyle, ...], vocabulary: Container[str], template: str
) -> CallStyle | None:
    for style in styles:
        signed = all(sign in template for sign in style.signs)
        if signed and all(token in vocabulary for token in style.tokens):
            return style
    return None


def mlx_lm_style(wrapper: Any) -> CallStyle | None:
    """What mlx-lm took it for. It parses notations of its own; grammars write JSON."""
    if wrapper.tool_parser is None:
        return None
    name = wrapper.tool_parser.__module__.rpartition(".")[2]
    if name in BY_PARSER:
        return BY_PARSER[name]
    start, end = wrapper.tool_call_start or "", wrapper.tool_call_end or ""
    return replace(objects.json_style(name, start, end), syntax=CallSyntax(start, end, json=False))
