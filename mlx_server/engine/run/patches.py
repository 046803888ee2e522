"""mlx-lm without its text side, which an engine never uses.

`import mlx_lm` brings in transformers and the generator; that takes three quarters of the time in
which an engine of a small model starts, and so of every swap of models.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

PACKAGE = "mlx_lm"
TEXT_MODULE = "mlx_lm.tokenizer_utils"


def leave_out_text_side() -> None:
    """Make mlx-lm's models importable without its tokenizers. Call before its first import.

    The package's `__init__` only re-exports what it imports, and `mlx_lm.utils` takes two names
    from the text module that it uses for text alone. Should a release want more, it gets all.
    """
    spec = find_spec(PACKAGE)
    if PACKAGE in sys.modules or spec is None:
        return
    package = ModuleType(PACKAGE)
    package.__spec__ = spec
    package.__path__ = list(spec.submodule_search_locations or [])
    text = ModuleType(TEXT_MODULE)
    vars(text).update(TokenizerWrapper=object, load=None)
    sys.modules |= {PACKAGE: package, TEXT_MODULE: text}
    try:
        import_module(f"{PACKAGE}.utils")
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
