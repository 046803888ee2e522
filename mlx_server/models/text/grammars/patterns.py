r"""Narrows schemas' regular expressions to what all validators match: `\d` and `\w` are ASCII in
ECMA-262, which JSON schema follows, and Unicode elsewhere.
"""

import re

DIGITS = r"\p{Nd}"
WORDS = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}"
NARROW = {"D": f"[^{DIGITS}]", "W": f"[^{WORDS}]"}
"""Neither reading's digits or word characters."""
NARROW_WITHIN_NEGATION = {"d": DIGITS, "w": WORDS, "D": "[^0-9]", "W": "[^0-9A-Za-z_]"}
"""The widest readings, narrowest when negated."""
PART = re.compile(r"\\(.)|\[\^?|\]|.", re.DOTALL)


def agreed(pattern: str) -> str:
    negated: list[bool] = []
    result = []
    for part in PART.finditer(pattern):
        text, escaped = part[0], part[1]
        if escaped is not None:
            meanings = NARROW_WITHIN_NEGATION if negated and negated[-1] else NARROW
            text = meanings.get(escaped, text)
        elif text.startswith("["):
            negated.append(text == "[^")
        elif text == "]" and negated:
            negated.pop()
        result.append(text)
    return "".join(result)
