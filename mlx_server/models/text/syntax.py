"""What a syntax of thinking and tool calls consists of; `styles/` has each family's."""

from dataclasses import dataclass, field
from enum import Enum

JSON_NAMES = r'[^"\\<>\[\]{}|\x00-\x1f]+'
"""Written as they are between quotes, and never taken for a marker."""
WORDS = r"[\w-]+"


@dataclass(frozen=True, slots=True)
class Reasoning:
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Where calls are in the text. A `start` of "": calls have no marker; an `end` of "": they last
    to the answer's end. `json`: objects with a name before the arguments, which stream. Others are
    parsed once complete.
    """

    start: str
    end: str
    json: bool
    others: tuple[str, ...] = ()
    """More start markers."""
    bare: tuple[str, ...] = ()
    """What a call begins with whose start marker is missing."""
    anywhere: bool = False
    """JSON calls need no marker, not even after text."""
    pythonic: bool = False
    """Nor does `[name(`."""
    shields: tuple[tuple[str, str], ...] = ()
    """What values stand between that may hold `end`; within quotes a backslash escapes."""
    names: str = ""
    """Pattern of the tools' names that it can spell; unless given, what JSON or a word can."""

    @property
    def spelling(self) -> str:
        return self.names or (JSON_NAMES if self.json else WORDS)


@dataclass(frozen=True, slots=True)
class Syntax:
    reasoning: Reasoning | None = None
    calls: CallSyntax | None = None
    channels: bool = False
    """Instead of both: answers are messages in `channels`."""
    visible: dict[int, str] = field(default_factory=dict)
    """Special tokens that readers need, though they have no bytes."""


@dataclass(frozen=True, slots=True)
class JsonArguments:
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """`start`, key, `middle`, value, `end` for each argument: texts as they are, others as JSON.
    `key` is a pattern of all up to the value; its group `kind` tells texts ("true") from others.
    """

    start: str
    middle: str
    end: str
    key: str
    middle_json: str | None = None
    """`middle` before values that are no texts."""


@dataclass(frozen=True, slots=True)
class PythonArguments:
    """`(key=value, ...)`; values are JSON or Python."""


@dataclass(frozen=True, slots=True)
class BracedArguments:
    """`{key:value,...}` with texts between two `escape`."""

    escape: str


Notation = JsonArguments | TaggedArguments | PythonArguments | BracedArguments


@dataclass(frozen=True, slots=True)
class CallStyle:
    """`syntax.start`, `opening`, calls joined by `between`, `closing`, `syntax.end`. A call is
    `before_name`, name, `before_arguments`, arguments, `after_arguments`. SLOTS may stand in what
    comes before others.
    """

    name: str
    syntax: CallSyntax
    before_name: str
    before_arguments: str
    after_arguments: str
    opening: str = ""
    between: str | None = None
    """None: one call per answer."""
    closing: str = ""
    notation: Notation = JsonArguments()
    header: str = ""
    """A pattern of all before the arguments, with the group `name`. Empty: calls are JSON."""
    ignored: tuple[str, ...] = ()
    """Markers that say nothing within calls."""
    signs: tuple[str, ...] = ()
    """Texts in the templates of the models that write so."""
    tokens: tuple[str, ...] = ()
    """Likewise, in their vocabularies."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is fixed, for finding special tokens in it."""
        syntax, notation = self.syntax, self.notation
        written: tuple[str, ...] = ()
        if isinstance(notation, TaggedArguments):
            written = (notation.start, notation.middle, notation.end)
        elif isinstance(notation, BracedArguments):
            written = (notation.escape,)
        return (
            *(syntax.start, syntax.end, *syntax.others, *syntax.bare, *self.ignored),
            *(self.opening, self.before_name, self.before_arguments, self.after_arguments),
            *(self.between or "", self.closing, *written),
        )


SLOTS = {"{index}": "[0-9]{1,2}", "{id}": "[A-Za-z0-9]{9}", "{space}": " ?"}
"""Patterns of what differs: a call's own number or name, SentencePiece's space after a marker."""


class Thinking(Enum):
    OPEN = "the block has begun"
    POSSIBLE = "the model may begin one"
    DONE = "no block comes any more"


def thinking_after(opening: str, reasoning: Reasoning | None) -> Thinking:
    if reasoning is None:
        return Thinking.DONE
    start, end = opening.rfind(reasoning.start), opening.rfind(reasoning.end)
    if start > end:
        return Thinking.OPEN
    return Thinking.POSSIBLE if end < 0 else Thinking.DONE
