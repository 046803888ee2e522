"""Answers that say the same but for what rounding explains."""

from dataclasses import dataclass

from tests.support.server import Answer

NEAR_TIE = 1e-3
"""Between log-probabilities: a prompt that is computed at once rounds otherwise than one that was
decoded token by token. That may swap the two likeliest tokens, or let a draw that falls close to
the border between two tokens fall on its other side."""


@dataclass(frozen=True)
class Token:
    """A token of an answer, and the likeliest ones in its place with their log-probabilities."""

    text: str
    top: dict[str, float]


def same(answer: Answer, expected: Answer) -> bool:
    """Assert that the answers say the same, or what a near-tie explains; whether it had to."""
    assert (answer.error, answer.done) == (None, True)
    assert answer.usage == expected.usage
    ours, theirs = _tokens(answer), _tokens(expected)
    pairs = zip(ours, theirs, strict=True)
    differing = next((pair for pair in pairs if pair[0].text != pair[1].text), None)
    if differing is None:
        assert (answer.texts, answer.reasons) == (expected.texts, expected.reasons)
        return False
    one, other = differing
    print(f"a near-tie? {one} {other}")
    for text in one.top.keys() & other.top.keys():
        assert abs(one.top[text] - other.top[text]) < NEAR_TIE
    if one.text in other.top and other.text in other.top:
        assert abs(other.top[one.text] - other.top[other.text]) < NEAR_TIE
    return True


def _tokens(answer: Answer) -> list[Token]:
    tokens = []
    for piece in answer.logprobs[0]:
        if "content" in piece:
            for entry in piece["content"]:
                top = {one["token"]: one["logprob"] for one in entry["top_logprobs"]}
                tokens.append(Token(entry["token"], top))
        else:
            tokens += map(Token, piece["tokens"], piece["top_logprobs"])
    return tokens
