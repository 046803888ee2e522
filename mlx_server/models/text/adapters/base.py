"""A model's text side, from the files of its folder."""

import re
from pathlib import Path
from typing import Any, ClassVar

from mlx_server.models.store.generation import eos_token_ids
from mlx_server.models.text.conversations.fitting import Fitting
from mlx_server.models.text.grammars.builder import GrammarBuilder
from mlx_server.models.text.grammars.checker import GrammarChecker
from mlx_server.models.text.parsing.calls import parse_calls
from mlx_server.models.text.protocol import Prepared
from mlx_server.models.text.special_tokens import SpecialTokens
from mlx_server.models.text.styles.finding import find_call_style, mlx_lm_style
from mlx_server.models.text.styles.thinking import find_reasoning
from mlx_server.models.text.syntax import (
    CallStyle,
    Reasoning,
    Syntax,
    Thinking,
    thinking_after,
)
from mlx_server.models.text.template import ChatTemplate
from mlx_server.models.text.tokenizer import TextTokenizer, load_tokenizer
from mlx_server.schemas.internal import ChatPrompt, Constraint, Prompt, TextPrompt, TokenPrompt


class Adapter:
    """One model's text side; subclasses hold what differs by family. Methods block and are
    thread-safe.
    """

    family: ClassVar[str]
    model_types: ClassVar[re.Pattern[str]]
    names: ClassVar[re.Pattern[str]]
    """For configs without a family; names are in lower case."""
    end_of_turn: ClassVar[tuple[str, ...]] = ()
    """Stop tokens, if in the vocabulary."""
    call_style: ClassVar[CallStyle | None] = None
    """Fallback if the vocabulary has its start marker."""

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        """Raises ModelLoadFailed."""
        wrapper = load_tokenizer(path, trust_remote_code)
        self.tokenizer = TextTokenizer(wrapper.backend_tokenizer)
        self.stop_tokens = eos_token_ids(path) | self._stop_tokens(wrapper.eos_token)
        self.template = ChatTemplate(wrapper)
        self._call_parser = wrapper.tool_parser
        self.style = self._find_style(wrapper)
        self._fitting = Fitting(self.template, self.style)
        reasoning = find_reasoning(wrapper.get_vocab(), self.template.source)
        self.syntax = self._find_syntax(reasoning)
        self._checker = GrammarChecker(self.tokenizer.backend, self.stop_tokens)
        self._grammars = self._find_grammars(reasoning)

    def prepare(self, prompt: Prompt, constraint: Constraint | None) -> Prepared:
        """Raises BadRequest without a chat template, when the template refuses the messages, or for
        a constraint, tool or thinking budget that cannot be enforced.
        """
        match prompt:
            case ChatPrompt():
                return self._prepare_chat(prompt, constraint)
            case TextPrompt(text=text):
                tokens = self.tokenizer.encode(text)
            case TokenPrompt(ids=ids):
                tokens = ids
        return Prepared(tokens, self._grammars.completion(constraint) if constraint else None)

    def prepare_grammars(self) -> None:
        """Do what the first grammar would have to wait for."""
        self._checker.prepare()

    def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """(name, JSON arguments) of the calls between the markers; none if garbled."""
        return parse_calls(text, tools, self.style, self._call_parser)

    def _prepare_chat(self, prompt: ChatPrompt, constraint: Constraint | None) -> Prepared:
        self.template.check(prompt)
        shown, text = self._fitting.render(self._for_template(prompt))
        thinking = self._thinking_after(shown, text)
        return Prepared(
            tokens=self.tokenizer.encode_bare(text),
            grammar=self._grammars.chat(prompt, constraint, thinking),
            thinking=thinking,
        )

    def _for_template(self, prompt: ChatPrompt) -> ChatPrompt:
        """What a family needs that cannot be found by rendering."""
        return prompt

    def _thinking_after(self, prompt: ChatPrompt, rendered: str) -> Thinking:
        reasoning = self.syntax.reasoning
        if reasoning is None:
            return Thinking.DONE
        if prompt.continue_final:
            answer = str(prompt.messages[-1]["content"])
            thinking = thinking_after(answer, reasoning)
            return Thinking.DONE if thinking is Thinking.POSSIBLE and answer.strip() else thinking
        # Messages may hold the markers: look only at what the template adds.
        return thinking_after(self.template.generation_prompt(prompt, rendered), reasoning)

    def _stop_tokens(self, eos_token: str | None) -> frozenset[int]:
        # By name: transformers answers for a missing token with the unknown token's id.
        names = {eos_token, *self.end_of_turn} - {None}
        ids = (self.tokenizer.token_id(str(name)) for name in names)
        return frozenset(i for i in ids if i is not None)

    def _find_style(self, wrapper: Any) -> CallStyle | None:
        style = self.call_style
        known = style and self.tokenizer.token_id(style.syntax.start) is not None
        return find_call_style(
            wrapper.get_vocab(),
            self.template.source if wrapper.has_chat_template else None,
            lambda: mlx_lm_style(wrapper),
            style if known else None,
        )

    def _find_syntax(self, reasoning: Reasoning | None) -> Syntax:
        marks = [reasoning.start, reasoning.end] if reasoning else []
        if self.style is not None:
            marks += self.style.texts
        return Syntax(
            reasoning=reasoning,
            calls=self.style.syntax if self.style else None,
            visible=SpecialTokens(self.tokenizer.special_tokens()).find(*marks),
        )

    def _find_grammars(self, reasoning: Reasoning | None) -> GrammarBuilder:
        return GrammarBuilder(self._checker, reasoning, self.style)
