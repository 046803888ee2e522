"""The adapter that works from what a model ships, and that the families specialise."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer

from mlx_server.errors import BadRequest, ModelLoadFailed
from mlx_server.models.store.folder import one_line, read_optional_config
from mlx_server.models.text.adapters.base import Capabilities, PreparedChat, Syntax
from mlx_server.models.text.adapters.token_bytes import TokenBytes
from mlx_server.models.text.adapters.tool_prompts import plain_messages
from mlx_server.models.text.call_parsing import read_calls
from mlx_server.models.text.grammars.binding import Binder
from mlx_server.models.text.grammars.call_styles import GENERIC, CallStyle, find_style
from mlx_server.models.text.grammars.lark import Grammars
from mlx_server.models.text.grammars.markers import Markers
from mlx_server.models.text.grammars.thinking import Thinking, find_reasoning, thinking_after
from mlx_server.schemas.internal import ChatPrompt, Constraint

# Arguments of the renderer itself: `chat_template` would let a client supply the program, the
# others change what comes back.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
MLX_LM_SETTINGS = {"chat_template_type", "tool_parser_type"}
"""Entries of tokenizer_config.json that only mlx-lm's own loader understands."""
TOOLS_IN_TEMPLATE = re.compile(r"\btools\b")
PROBE = "a probe of the system role"
SLICE = 1 << 16
SLICE_SLACK = 256


class GenericAdapter:
    """The text side of a model: template, tokenizer and stop tokens as found in its folder.

    A family says by which `model_type` and name it is known, and which tokens end its turns.
    """

    family: str = "generic"
    model_types: ClassVar[re.Pattern[str] | None] = None
    names: ClassVar[re.Pattern[str] | None] = None
    end_of_turn: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path, config: dict[str, Any], trust_remote_code: bool = False) -> None:
        self._wrapper = load_tokenizer(path, trust_remote_code)
        self.tokenizer: Tokenizer = self._wrapper.backend_tokenizer
        # What tokenizer.json may have baked in; it would cut prompts short.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._token_bytes = TokenBytes(self.tokenizer)
        self._beginning = self._find_beginning()
        self.stop_tokens = self._find_stop_tokens(config, read_optional_config(path))
        self._template = _template_text(self._wrapper.chat_template)
        self._reasoning = find_reasoning(self._wrapper, self._template)
        self._style = self._find_style()
        self.capabilities = self._find_capabilities()
        self.syntax = self._find_syntax()
        grammars = Grammars(self.tokenizer, self.stop_tokens)
        self._binder = Binder(grammars, self._reasoning, self._style)

    def render(self, prompt: ChatPrompt) -> list[int]:
        return self._encode(self._render_text(prompt))

    def prepare(self, prompt: ChatPrompt, constraint: Constraint | None) -> PreparedChat:
        text = self._render_text(prompt)
        thinking = self._thinking_after(prompt, text)
        return PreparedChat(
            tokens=self._encode(text),
            grammar=self._binder.chat(prompt, constraint, thinking),
            thinking=thinking is Thinking.OPEN,
            forced=prompt.use is not None and prompt.use.choice != "auto",
        )

    def bind(self, constraint: Constraint) -> str:
        return self._binder.text(constraint)

    def parse_calls(self, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return read_calls(text, tools, self._wrapper.tool_parser)

    def encode(self, text: str) -> list[int]:
        ids = self._encode(text)
        if ids[: len(self._beginning)] == self._beginning:
            return ids
        return self._beginning + ids

    def surely_exceeds(self, text: str, limit: int) -> bool:
        count = 0
        for start in range(0, len(text), SLICE):
            # A cut can add tokens to those of the whole text, if only a few.
            count += max(0, len(self._encode(text[start : start + SLICE])) - SLICE_SLACK)
            if count > limit:
                return True
        return False

    def token_bytes(self, token: int) -> bytes:
        return self._token_bytes(token)

    def token_name(self, token: int) -> str:
        return self.tokenizer.id_to_token(token) or f"<{token}>"

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _render_text(self, prompt: ChatPrompt) -> str:
        self._check(prompt)
        return self._apply_template(prompt, add_generation_prompt=not prompt.continue_final)

    def _apply_template(self, prompt: ChatPrompt, **options: Any) -> str:
        try:
            rendered: str = self._wrapper.apply_chat_template(
                self._messages(prompt),
                tools=None if self._style is GENERIC else prompt.tools,
                continue_final_message=prompt.continue_final,
                tokenize=False,
                **options,
                **prompt.template_kwargs,
            )
        except Exception as error:
            # A template is a program that runs on the client's data: whatever it raises, from
            # raise_exception to a TypeError, is that data's fault.
            raise BadRequest(
                f"The model's chat template refuses these messages: {one_line(error)}",
                param="messages",
            ) from error
        return rendered

    def _messages(self, prompt: ChatPrompt) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        if self._style is not GENERIC:
            return prompt.messages
        tools = prompt.tools
        return plain_messages(
            prompt.messages, tools, system_role=tools is None or self.capabilities.system_role
        )

    def _thinking_after(self, prompt: ChatPrompt, text: str) -> Thinking:
        """What of a block of thinking is still to come after the prompt, rendered as `text`."""
        if self._reasoning is None:
            return Thinking.DONE
        if prompt.continue_final:
            said = str(prompt.messages[-1]["content"])
            after = thinking_after(said, self._reasoning)
            return Thinking.DONE if after is Thinking.POSSIBLE and said.strip() else after
        # A user may write of the markers, so only what the template adds for the answer counts.
        bare = self._apply_template(prompt, add_generation_prompt=False)
        return thinking_after(_addition(text, bare), self._reasoning)

    def _check(self, prompt: ChatPrompt) -> None:
        if not self._wrapper.has_chat_template:
            raise BadRequest(
                "This model has no chat template, so it cannot take messages; "
                "send it a text with /v1/completions.",
                param="messages",
            )
        if reserved := sorted(RESERVED_TEMPLATE_KWARGS & prompt.template_kwargs.keys()):
            raise BadRequest(
                f"These cannot be set for the chat template: {', '.join(reserved)}",
                param="chat_template_kwargs",
            )
        if prompt.continue_final and not _ends_with_assistant_text(prompt.messages):
            raise BadRequest(
                "Only a last message of the assistant, with text, can be continued.",
                param="messages",
            )

    def _encode(self, text: str) -> list[int]:
        # Of the ways to encode, only those for batches let go of Python's lock.
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _find_beginning(self) -> list[int]:
        """What the tokenizer puts in front of a text. What it puts behind would end the text."""
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole: list[int] = self.tokenizer.encode("a", add_special_tokens=True).ids
        return whole[: whole.index(bare[0])] if bare else []

    def _find_stop_tokens(
        self, config: dict[str, Any], generation_config: dict[str, Any]
    ) -> frozenset[int]:
        names = {self._wrapper.eos_token, *self.end_of_turn} - {None}
        # By name: transformers answers for a missing token with the id of the unknown token.
        ids = {self.tokenizer.token_to_id(str(name)) for name in names} - {None}
        for settings in (config, config.get("text_config") or {}, generation_config):
            ids |= _as_ids(settings.get("eos_token_id"))
        return frozenset(i for i in ids if i is not None)

    def _find_style(self) -> CallStyle | None:
        if not self._wrapper.has_chat_template:
            return None
        if self._template and not TOOLS_IN_TEMPLATE.search(self._template):
            return GENERIC
        parser = self._wrapper.tool_parser
        style = find_style(
            self._template,
            parser.__module__.rpartition(".")[2] if parser else None,
            self._wrapper.tool_call_start or "",
            self._wrapper.tool_call_end or "",
        )
        return style or self._usual_style() or GENERIC

    def _usual_style(self) -> CallStyle | None:
        """How the family writes calls where its template does not tell."""
        return None

    def _find_capabilities(self) -> Capabilities:
        return Capabilities(
            chat=self._wrapper.has_chat_template,
            tools=self._style is not None,
            reasoning=self._reasoning is not None,
            system_role=self._has_system_role(),
            tool_syntax=self._style.name if self._style else None,
        )

    def _find_syntax(self) -> Syntax:
        special = {
            token.content: i
            for i, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        marks: list[str] = []
        if self._reasoning is not None:
            marks += [self._reasoning.start, self._reasoning.end]
        if self._style is not None:
            marks += [self._style.syntax.start, self._style.syntax.end, *self._style.marks]
        return Syntax(
            reasoning=self._reasoning,
            calls=self._style.syntax if self._style else None,
            visible=Markers(special).found(*marks),
        )

    def _has_system_role(self) -> bool:
        messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "Hello"}]
        try:
            return PROBE in self._render_text(ChatPrompt(messages))
        except BadRequest:
            return False


def import_tokenizers() -> Any:
    """mlx-lm's `tokenizer_utils`. To be called by the main thread before any other does.

    It takes seconds, which commands without a model need not wait for. And it leaves MLX's state
    in the thread that imports it; a thread that ends while the interpreter does aborts there.
    """
    # mlx_lm comes first: it silences advice that transformers gives when it is imported.
    from mlx_lm import tokenizer_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    return tokenizer_utils


def load_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """mlx-lm's wrapper around the tokenizer in `path`. Raises ModelLoadFailed."""
    tokenizer_utils = import_tokenizers()
    try:
        wrapper = _wrapped(tokenizer_utils, path, trust_remote_code)
    except Exception as error:
        # Broken files surface as whatever the parser in question raises; the Rust ones raise
        # bare Exceptions.
        raise ModelLoadFailed(
            f"The tokenizer in {path.name} could not be loaded: {one_line(error)}"
        ) from error
    if not isinstance(getattr(wrapper, "backend_tokenizer", None), Tokenizer):
        raise ModelLoadFailed(f"The tokenizer in {path.name} has no fast form (tokenizer.json).")
    return wrapper


def _wrapped(tokenizer_utils: Any, path: Path, trust_remote_code: bool) -> Any:
    """What `tokenizer_utils.load` returns, without its second reading of tokenizer.json.

    Reading that file holds Python's lock, a tenth of a second for a vocabulary of 50,000, which the
    event loop shall not feel twice. Models that need settings of mlx-lm's own take its way.
    """
    from transformers import AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if MLX_LM_SETTINGS & tokenizer.init_kwargs.keys():
        return tokenizer_utils.load(path, options)
    parser_name = tokenizer_utils._infer_tool_parser(tokenizer)
    if parser_name is None:
        return tokenizer_utils.TokenizerWrapper(tokenizer)
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{parser_name}")
    return tokenizer_utils.TokenizerWrapper(
        tokenizer,
        tool_parser=parser.parse_tool_call,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
    )


def _as_ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {i for i in values if isinstance(i, int)}


def _addition(text: str, beginning: str) -> str:
    """`text` from where it departs from `beginning`."""
    if text.startswith(beginning):
        return text[len(beginning) :]
    pairs = enumerate(zip(text, beginning, strict=False))
    return text[next((i for i, (ours, theirs) in pairs if ours != theirs), len(text)) :]


def _template_text(template: Any) -> str:
    """A chat template, or all of those that a model names."""
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return str(template or "")


def _ends_with_assistant_text(messages: list[dict[str, Any]]) -> bool:
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and isinstance(last.get("content"), str)
