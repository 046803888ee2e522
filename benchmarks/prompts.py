"""The prompts that benchmarks send: distinct, 20 to 40 tokens, asking for long answers."""

import itertools
import random

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


def distinct_prompts(count: int, seed: int) -> list[str]:
    """`count` different prompts, in an order that depends on `seed` alone."""
    every = [
        f"{asked} {who} {where}." for asked, who, where in itertools.product(_ASKED, _WHO, _WHERE)
    ]
    if count > len(every):
        raise ValueError(f"there are {len(every)} prompts, {count} are wanted")
    random.Random(seed).shuffle(every)
    return every[:count]
