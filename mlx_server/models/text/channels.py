"""The marks of messages in channels: gpt-oss's harmony format.

An answer is messages, each `<|start|>` role `<|channel|>` channel `<|message|>` text `<|end|>`; the
role or the channel may be followed by ` to=` a recipient, and the channel by the text's format.
Source: https://github.com/openai/harmony/blob/main/docs/format.md
"""

from collections.abc import Mapping
from enum import StrEnum

ANALYSIS = "analysis"
COMMENTARY = "commentary"
FINAL = "final"
FUNCTIONS = "functions."
"""Prefix of a recipient that is a function."""


class Mark(StrEnum):
    """Shown to readers in place of the special tokens. Unicode keeps these characters out of texts,
    so that a text that spells a token is no mark.
    """

    START = "\ufdd0"
    CHANNEL = "\ufdd1"
    CONSTRAIN = "\ufdd2"
    MESSAGE = "\ufdd3"
    END = "\ufdd4"
    STOP = "\ufdd5"


MARKS: Mapping[str, Mark] = {
    "<|start|>": Mark.START,
    "<|channel|>": Mark.CHANNEL,
    "<|constrain|>": Mark.CONSTRAIN,
    "<|message|>": Mark.MESSAGE,
    "<|end|>": Mark.END,
    "<|return|>": Mark.STOP,
    "<|call|>": Mark.STOP,
}
