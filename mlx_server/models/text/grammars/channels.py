"""Grammars of answers in channels (`models.text.channels`): messages of thinking, then a call or
the answer, which the model's stop token ends.
"""

import msgspec

from mlx_server.models.text.channels import ANALYSIS, COMMENTARY, FINAL, FUNCTIONS
from mlx_server.models.text.grammars.builder import (
    GrammarBuilder,
    constrained_answer,
    refusing,
)
from mlx_server.models.text.grammars.calls import arguments_schema
from mlx_server.models.text.grammars.lark import ANY_TEXT, Lark
from mlx_server.models.text.syntax import Thinking
from mlx_server.schemas.internal import ChatPrompt, Constraint, ToolUse

END = "<|end|>"
NEXT = "<|start|>assistant"
MESSAGE = "<|message|>"
THOUGHT = f"<|channel|>{ANALYSIS}{MESSAGE}"
PREAMBLE = f"<|channel|>{COMMENTARY}{MESSAGE}"


class ChannelGrammarBuilder(GrammarBuilder):
    def chat(
        self, prompt: ChatPrompt, constraint: Constraint | None, thinking: Thinking
    ) -> str | None:
        """Templates cannot turn the thinking off: `enable_thinking` does it here."""
        if (
            prompt.thinking_budget is None
            and prompt.template_kwargs.get("enable_thinking") is False
        ):
            prompt = msgspec.structs.replace(prompt, thinking_budget=0)
        return super().chat(prompt, constraint, thinking)

    def _start(
        self,
        lark: Lark,
        use: ToolUse | None,
        constraint: Constraint | None,
        thinking: Thinking,
        budget: int | None,
    ) -> str:
        forced = use is not None and use.choice != "auto"
        answer = None if constraint is None else constrained_answer(lark, constraint)
        if thinking is Thinking.DONE:
            return self._rest_of_answer(lark, use if forced else None, answer)
        ends = [] if use is None else [self._call(lark, use)]
        if not forced:
            ends.append(_final(lark, answer))
        free = not forced and constraint is None
        end = lark.rule("ending", " | ".join(ends))
        return _with_thinking(lark, thinking, end, budget, preambles=free)

    def _rest_of_answer(self, lark: Lark, forced: ToolUse | None, answer: str | None) -> str:
        if forced is not None:
            return f"{lark.exactly(END + NEXT)} {self._call(lark, forced)}"
        return answer or lark.rule("TEXT", ANY_TEXT)

    def _call(self, lark: Lark, use: ToolUse) -> str:
        with refusing("tools"):
            calls = [_call_of(lark, use, index) for index in range(len(use.tools))]
            return lark.rule("one_call", " | ".join(calls))


def _with_thinking(
    lark: Lark, thinking: Thinking, end: str, budget: int | None, *, preambles: bool
) -> str:
    """One thought of at most `budget` tokens, or as many as the model likes without one."""
    start, next_header = lark.exactly(THOUGHT), lark.exactly(NEXT)
    text = lark.text_until(END) if budget is None else lark.tokens_until(END, budget)
    thought = lark.rule("thought", f"{start} {text} {next_header}")
    preamble = lark.rule(
        "preamble", f"{lark.exactly(PREAMBLE)} {lark.text_until(END)} {next_header}"
    )
    between = f"{preamble}*" if preambles else ""
    if budget is None:
        before = f"({thought} | {preamble})*" if preambles else f"{thought}*"
    elif budget == 0 or thinking is Thinking.OPEN:
        before = between
    else:
        before = f"{between} ({thought} {between})?"
    opened = f"{text} {next_header}" if thinking is Thinking.OPEN else ""
    return lark.rule("answer", f"{opened} {before} {end}")


def _final(lark: Lark, answer: str | None) -> str:
    header = f"{lark.exactly(f'<|channel|>{FINAL}')} ({_format(lark)})? {lark.exactly(MESSAGE)}"
    return f"{header} {answer or lark.rule('TEXT', ANY_TEXT)}"


def _call_of(lark: Lark, use: ToolUse, index: int) -> str:
    recipient = f" to={FUNCTIONS}{use.tools[index]['function']['name']}"
    channel = f"<|channel|>{COMMENTARY}"
    header = f"{lark.exactly(channel + recipient)} | {lark.exactly(recipient + channel)}"
    arguments = lark.schema(arguments_schema(use, index))
    return lark.rule("call", f"({header}) {_format(lark)} {lark.exactly(MESSAGE)} {arguments}")


def _format(lark: Lark) -> str:
    return lark.rule("format", f'" json" | " "? {lark.exactly("<|constrain|>json")}')
