"""How byte-level tokenizers cut a text into words, by the names that GGUF has for it."""

from mlx_server.models.store.gguf.reading import GgufFile

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _tiktoken(numbers: str) -> str:
    return (
        rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
    )


def _cased(numbers: str, short: str) -> str:
    first = r"[^\r\n\p{L}\p{N}]?"
    words = [f"{first}[{UPPER}]*[{LOWER}]+{short}", f"{first}[{UPPER}]+[{LOWER}]*{short}"]
    return "|".join([*words, numbers, SIGNS, SPACES])


SPLITS: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [WORDS],
    "smollm": [r"\p{N}", WORDS],
    "llama-bpe": [_tiktoken(r"\p{N}{1,3}")],
    "qwen2": [_tiktoken(r"\p{N}")],
    "gpt-4o": [_cased(r"\p{N}{1,3}", f"{SHORT}?")],
    "tekken": [_cased(r"\p{N}", "")],
}
"""Expressions that split a text one after the other."""
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
    "llama4": "gpt-4o",
}
WHOLE_WORDS = frozenset({"llama-bpe", "tekken"})
"""Rules under which a word that is a token is not merged from its letters."""


def rule_of(file: GgufFile) -> str:
    rule = str(file.get("tokenizer.ggml.pre", "default"))
    return ALIASES.get(rule, rule)
