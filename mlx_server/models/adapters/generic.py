"""The adapter that works from what a model ships, and that the families specialise."""

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer

from mlx_server.errors import BadRequest, ModelLoadFailed
from mlx_server.models.adapters.base import Capabilities, Syntax
from mlx_server.models.adapters.pieces import TokenBytes
from mlx_server.models.folder import one_line, read_optional_config
from mlx_server.schemas.internal import ChatPrompt

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
        self.capabilities = self._find_capabilities()
        self.syntax = Syntax()

    def render(self, prompt: ChatPrompt) -> list[int]:
        return self._encode(self._render_text(prompt))

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
        try:
            rendered: str = self._wrapper.apply_chat_template(
                prompt.messages,
                tools=prompt.tools,
                add_generation_prompt=not prompt.continue_final,
                continue_final_message=prompt.continue_final,
                tokenize=False,
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

    def _find_capabilities(self) -> Capabilities:
        template = json.dumps(self._wrapper.chat_template or "")
        return Capabilities(
            chat=self._wrapper.has_chat_template,
            tools=self._wrapper.has_tool_calling or "tools" in template,
            reasoning=self._wrapper.has_thinking,
            system_role=self._has_system_role(),
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


def _ends_with_assistant_text(messages: list[dict[str, Any]]) -> bool:
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and isinstance(last.get("content"), str)
