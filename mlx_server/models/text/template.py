"""Renders chat templates."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from mlx_server.errors import BadRequest
from mlx_server.models.store.folder import one_line
from mlx_server.schemas.internal import ChatPrompt

# The renderer's own arguments: `chat_template` would let clients supply the program, others change
# the result.
RESERVED_KWARGS = frozenset(
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
PROBE = "probe"
THINKING_SWITCHES = ("enable_thinking", "thinking")
JINJA_ONLY = frozenset({"reasoning_effort", "thinking_budget"})


class ChatTemplate:
    """Thread-safe."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._apply = _renderer(wrapper)
        template = wrapper.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        self.source = "\n".join(map(str, texts))

    def check(self, prompt: ChatPrompt) -> None:
        """Raises BadRequest for unsupported arguments."""
        if not self._wrapper.has_chat_template:
            raise BadRequest(
                "This model has no chat template, so it cannot take messages; "
                "send it a text with /v1/completions.",
                param="messages",
            )
        if reserved := sorted(RESERVED_KWARGS & prompt.template_kwargs.keys()):
            raise BadRequest(
                f"These cannot be set for the chat template: {', '.join(reserved)}",
                param="chat_template_kwargs",
            )
        if prompt.continue_final and not _ends_with_assistant_text(prompt.messages):
            raise BadRequest(
                "Only a last message of the assistant, with text, can be continued.",
                param="messages",
            )

    def render(self, prompt: ChatPrompt, *, add_generation_prompt: bool) -> str:
        """Raises BadRequest when the template fails."""
        try:
            rendered = self._apply(
                _in_parts(prompt.messages) if self._wants_parts else prompt.messages,
                tools=prompt.tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=prompt.continue_final,
                **prompt.template_kwargs,
            )
        except Exception as error:
            # A template is a program run on the client's data: whatever it raises is that data's
            # fault.
            raise BadRequest(
                f"The model's chat template refuses these messages: {one_line(error)}",
                param="messages",
            ) from error
        return rendered

    def generation_prompt(self, prompt: ChatPrompt, rendered: str) -> str:
        return _text_after(self.render(prompt, add_generation_prompt=False), rendered)

    @cached_property
    def _wants_parts(self) -> bool:
        """Templates of vision models may drop or refuse content that is no list of parts."""
        messages = [{"role": "user", "content": PROBE}]
        made = (self._try(one) for one in (messages, _in_parts(messages)))
        return [PROBE in text for text in made] == [False, True]

    def _try(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._apply(messages, tools=None, add_generation_prompt=True)
        except Exception:  # noqa: BLE001
            # As in `render`.
            return ""


def _renderer(wrapper: Any) -> Callable[..., str]:
    """Without mlx-lm's wrapper, which asks templates for thinking unasked. Models without a Jinja
    template bring a function, which knows no variables but `enable_thinking`.
    """
    function = wrapper._chat_template
    if function is None:
        return partial(_apply_jinja, wrapper._tokenizer)
    return partial(_apply_function, function)


def _apply_jinja(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    # The two names that templates have for the switch of thinking stand for each other.
    for one, other in (THINKING_SWITCHES, THINKING_SWITCHES[::-1]):
        if one in options:
            options.setdefault(other, options[one])
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return rendered


def _apply_function(
    function: Callable[..., str], messages: list[dict[str, Any]], **options: Any
) -> str:
    known = {name: value for name, value in options.items() if name not in JINJA_ONLY}
    return function(messages, **known)


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _ends_with_assistant_text(messages: list[dict[str, Any]]) -> bool:
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and isinstance(last.get("content"), str)


def _text_after(beginning: str, text: str) -> str:
    if text.startswith(beginning):
        return text[len(beginning) :]
    pairs = enumerate(zip(text, beginning, strict=False))
    return text[next((i for i, (a, b) in pairs if a != b), len(text)) :]
