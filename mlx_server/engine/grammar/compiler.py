"""Grammars compiled in threads.

llguidance is imported at the first grammar: it keeps some 50 MB for 50,000 tokens.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_server.engine.grammar.grammar import Grammar, Vocabulary

THREADS = 2
"""A grammar that takes seconds leaves the others one."""
MOST_GRAMMARS = 64


class GrammarCompiler:
    """`vocab_size` is the width of the model's logits."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._tokenizer: bytes | None = None
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._vocabulary: Future[Vocabulary] | None = None
        self._grammars: OrderedDict[str, Future[Grammar]] = OrderedDict()

    def compile(self, text: str) -> "Future[Grammar]":
        """Each text once; the exception is a GrammarError."""
        if text not in self._grammars:
            self._grammars[text] = self._threads.submit(_compile, self._read_vocabulary(), text)
            while len(self._grammars) > MOST_GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(text)
        return self._grammars[text]

    def prepare(self) -> None:
        """Read the vocabulary, which holds Python's lock, while nobody waits."""
        self._read_vocabulary()

    def take_tokenizer(self, content: bytes) -> None:
        """As tokenizer.json, instead of the folder's. Call before the first grammar."""
        self._tokenizer = content
        self._vocabulary = None  # it may have been prepared from the folder

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_vocabulary(self) -> "Future[Vocabulary]":
        if self._vocabulary is None:
            self._vocabulary = self._threads.submit(
                _vocabulary, self._folder, self._vocab_size, self._tokenizer
            )
        return self._vocabulary


def _vocabulary(folder: Path, size: int, tokenizer: bytes | None) -> "Vocabulary":
    from mlx_server.engine.grammar.grammar import Vocabulary

    return Vocabulary(folder, size, tokenizer)


def _compile(vocabulary: "Future[Vocabulary]", text: str) -> "Grammar":
    from mlx_server.engine.grammar.grammar import Grammar, GrammarError

    try:
        return Grammar(vocabulary.result(), text)
    except GrammarError:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise GrammarError(f"the grammar cannot be used: {error}") from error
