"""Tiny models that play an agent's part: real weights that say a given answer in each turn.

A template is a program, so the model's own counts the answers so far and ends the prompt in a token
that stands for the turn. That token leads to the first piece of the turn's answer, and each piece
to the next. Calls are written as the family's template writes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny

PIECE = 8
"""Least bytes of a script's piece, but for its last."""
ASIDE = "<|aside|>"


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Play:
    """`turns` come one after another, the last again and again; `aside` answers what has no tools,
    such as a wish for a title, if the play has calls.
    """

    turns: tuple[str | Call, ...]
    aside: str = "A title"


def build_rehearsed_model(
    folder: Path, play: Play, *, family: str = "qwen3", context: int = 131072
) -> Path:
    """Write a model to `folder` that plays in the syntax of `family`, a byte-level one. Grammars,
    such as those of strict tools, make it lose its text: they force tokens that are not its own.
    """
    kind = tiny.KINDS[family]
    assert isinstance(kind.template, str)
    cues = [f"<|turn-{number}|>" for number in range(len(play.turns))]
    tokenizer = tiny.tiny_tokenizer(family, extra_tokens=(*cues, ASIDE))
    texts = [*_written(tokenizer, kind, play.turns), play.aside]
    cut = cut_into_pieces([_as_characters(text) for text in texts])
    tokenizer = tiny.with_pieces(tokenizer, [one for pieces in cut for one in pieces], kind)
    has_calls = any(isinstance(turn, Call) for turn in play.turns)
    template = kind.template + _cue(len(cues), "tools" if has_calls else "true")
    tiny.save_text_side(folder, family, tokenizer, template)
    size = 1 + sum(len(pieces) + 1 for pieces in cut)
    config = tiny.write_config(folder, family, tokenizer, context, 1, 32 * (size // 32 + 1))
    chains = [
        [tiny.token_id(tokenizer, one) for one in (cue, *pieces)]
        for cue, pieces in zip((*cues, ASIDE), cut, strict=True)
    ]
    end = tiny.token_id(tokenizer, kind.eos[0])
    tiny.save_weights(folder, tiny.chained_weights(config, chains, end))
    return folder


def _cue(turns: int, condition: str) -> str:
    return (
        "{%- if add_generation_prompt %}"
        "{%- set turn = messages | selectattr('role', 'equalto', 'assistant') | list | length %}"
        f"{{{{- '<|turn-' ~ [turn, {turns - 1}] | min ~ '|>' if {condition} else '{ASIDE}' }}}}"
        "{%- endif %}"
    )


def _written(tokenizer: Any, kind: tiny.Family, turns: Sequence[str | Call]) -> list[str]:
    """The turns as the template writes an assistant's."""
    renderer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    renderer.eos_token, renderer.bos_token = kind.eos[0], kind.bos
    renderer.chat_template = kind.template
    question = [{"role": "user", "content": "?"}]
    asked = renderer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    texts = []
    for turn in turns:
        if isinstance(turn, str):
            texts.append(turn)
            continue
        function = {"name": turn.name, "arguments": turn.arguments}
        call = {"type": "function", "id": "call00001", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        told = renderer.apply_chat_template([*question, answer], tokenize=False)
        assert told.startswith(asked), (asked, told)
        texts.append(told[len(asked) :].partition(kind.eos[0])[0])
    return texts


def _as_characters(text: str) -> str:
    """As byte-level vocabularies write it: a character per byte."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


def cut_into_pieces(texts: Sequence[str]) -> list[list[str]]:
    """Each text in pieces, no two alike in all of them. Raises ValueError if a text is all said."""
    used: set[str] = set()
    return [_cut(text, used) for text in texts]


def _cut(text: str, used: set[str]) -> list[str]:
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = start + PIECE
        while text[start:end] in used and end < len(text):
            end += 1
        piece = text[start:end]
        while piece in used:
            # The rest was said before: it joins what it follows.
            if not pieces:
                raise ValueError(f"{text!r} is no more than a piece of another")
            used.discard(pieces[-1])
            piece = pieces.pop() + piece
        pieces.append(piece)
        used.add(piece)
        start = end
    return pieces
