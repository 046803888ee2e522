"""The prompts that benchmarks send: short ones asking for long answers, and texts of any length."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

_ASKED = [
    "Tell a long story, with many details, about",
    "Write several paragraphs, full of description, about",
    "Write the first chapter of a novel about",
    "Describe at length, one scene after the other, a day of",
]
_WHO = [
    "a retired sailor",
    "a young botanist",
    "two rival bakers",
    "a village doctor",
    "a travelling clockmaker",
    "an old librarian",
    "a family of musicians",
    "a night-shift engineer",
    "a stubborn mountain guide",
    "a student of astronomy",
]
_WHERE = [
    "who lives in a lighthouse on a rocky coast",
    "who finds a map under the floor of a windmill",
    "who has to cross a desert before the rains come",
    "who opens a small shop beside a busy harbour",
    "who spends one winter in a town without electricity",
    "who restores a garden that nobody has entered for years",
    "who takes the last train through a valley of orchards",
    "who keeps a diary of everything that happens on one street",
    "who is asked to repair the bells of a cathedral",
    "who learns that the river behind the house is rising",
]
_QUALITIES = [
    "patient",
    "narrow",
    "silent",
    "crowded",
    "bright",
    "worn",
    "distant",
    "generous",
    "careful",
    "hollow",
    "early",
    "sudden",
    "familiar",
    "heavy",
    "curious",
    "wooden",
    "frozen",
    "gentle",
    "ancient",
    "hidden",
]
_THINGS = [
    "harbour",
    "letter",
    "engine",
    "orchard",
    "lantern",
    "bridge",
    "captain",
    "market",
    "violin",
    "valley",
    "notebook",
    "teacher",
    "winter",
    "kitchen",
    "compass",
    "forest",
    "station",
    "painter",
    "window",
    "river",
    "clock",
    "village",
    "ladder",
    "garden",
]
_DEEDS = [
    "followed",
    "repaired",
    "remembered",
    "carried",
    "described",
    "opened",
    "measured",
    "borrowed",
    "crossed",
    "painted",
    "answered",
    "guarded",
    "counted",
    "replaced",
    "visited",
    "ignored",
]
_TIMES = [
    "before noon",
    "after the storm",
    "on the third evening",
    "without a word",
    "as every year",
    "in the following week",
    "for the second time",
    "while the others slept",
]
_SENTENCES = [
    "The {q1} {t1} {d1} a {q2} {t2} {when}.",
    "{When}, nobody in the {t1} {d1} the {q1} {t2}.",
    "It was the {t1}, {q1} and {q2}, that the {t2} {d1} {when}.",
    "{n} people {d1} the {t1} near the {q1} {t2}, and {m} of them {d2} another {t3}.",
    "Why the {t1} {d1} such a {q1} {t2} was never explained; the {t3} only {d2} it {when}.",
    "Page {n} says that a {q1} {t1} {d1} the {t2} and {d2} the {q2} {t3}.",
]


def distinct_prompts(count: int, seed: int) -> list[str]:
    """`count` different prompts of 20 to 40 tokens, in an order that depends on `seed` alone."""
    every = [
        f"{asked} {who} {where}." for asked, who, where in itertools.product(_ASKED, _WHO, _WHERE)
    ]
    if count > len(every):
        raise ValueError(f"there are {len(every)} prompts, {count} are wanted")
    random.Random(seed).shuffle(every)
    return every[:count]


class Texts:
    """Made-up English that repeats itself little. The same `seed` gives the same texts in turn."""

    def __init__(self, model: Path, seed: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._random = random.Random(seed)

    def text(self, tokens: int) -> str:
        """The next text, of `tokens` of the model's tokens; it may end within a sentence."""
        words = " ".join(itertools.islice(self._sentences(), tokens // 8 + 1))
        ids = self._tokenizer.encode(words, add_special_tokens=False).ids
        return str(self._tokenizer.decode(ids[:tokens]))

    def _sentences(self) -> Iterator[str]:
        draw = self._random
        while True:
            when = draw.choice(_TIMES)
            first, second = draw.sample(_DEEDS, 2)
            one, other = draw.sample(_QUALITIES, 2)
            things = dict(zip(("t1", "t2", "t3"), draw.sample(_THINGS, 3), strict=True))
            yield draw.choice(_SENTENCES).format(
                d1=first, d2=second, q1=one, q2=other, when=when, When=when.capitalize(),
                n=draw.randrange(20, 900), m=draw.randrange(2, 20), **things,
            )  # fmt: skip
