"""Whether two model folders have one vocabulary: the same text for each token id."""

from collections.abc import Mapping
from pathlib import Path

from mlx_server.tokenizer_json import NAME, read_vocabulary

OTHERS = ("tokenizer.model", "tiktoken.model", "vocab.json")
"""What has the vocabulary where there is no tokenizer.json."""


def mismatch(folder: Path, other: Path, below: int) -> str | None:
    """Why tokens of one are not those of the other; all must be smaller than `below`."""
    mine, theirs = read_vocabulary(folder), read_vocabulary(other)
    if mine is None and theirs is None:
        return _differing_file(folder, other)
    if mine is None or theirs is None:
        return f"only one of their folders has a readable {NAME} to compare"
    if mine != theirs:
        return f"their vocabularies differ: {_difference(mine, theirs)}"
    if (last := max(mine, default=0)) >= below:
        return f"their vocabulary has token {last:,}, and one of them knows {below:,} tokens alone"
    return None


def _difference(mine: Mapping[int, str], theirs: Mapping[int, str]) -> str:
    if len(mine) != len(theirs):
        return f"one has {len(mine):,} tokens, the other {len(theirs):,}"
    first = min(id_ for id_ in mine.keys() | theirs.keys() if mine.get(id_) != theirs.get(id_))
    return f"token {first} is {mine.get(first)!r} in one, {theirs.get(first)!r} in the other"


def _differing_file(folder: Path, other: Path) -> str | None:
    name = next((name for name in OTHERS if (folder / name).is_file()), None)
    if name is None:
        return f"their folders have no {NAME} to compare"
    if not (other / name).is_file() or (folder / name).read_bytes() != (other / name).read_bytes():
        return f"their vocabularies differ: {name} is not the same file"
    return None
