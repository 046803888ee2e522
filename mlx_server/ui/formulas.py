"""Formulas in TeX as MathML, which browsers draw themselves."""

import html
from xml.etree.ElementTree import tostring

from latex2mathml import exceptions
from latex2mathml.converter import convert_to_element

LONGEST = 4000
"""Characters."""
FAULTS: tuple[type[Exception], ...] = (
    *(
        kind
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    RecursionError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)
"""What its parser makes of bad TeX."""


def mathml(tex: str, display: str) -> str:
    """`display` is "inline" or "block". Bad TeX is shown as it is."""
    if len(tex) > LONGEST:
        return _source(tex)
    try:
        tree = convert_to_element(tex, display=display)
    except FAULTS:
        return _source(tex)
    for element in tree.iter():
        # Its symbols are entities; serialized, everything is escaped again.
        element.text = element.text and html.unescape(element.text)
        element.tail = element.tail and html.unescape(element.tail)
        element.attrib.pop("href", None)
    return tostring(tree, encoding="unicode")


def _source(tex: str) -> str:
    return f"<code>{html.escape(tex)}</code>"
