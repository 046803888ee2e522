"""Transformers, narrowed to what tokenizers need.

Its `__init__` and that of its `models` read the source of some 1,600 modules each, to learn what
those export: more than half of the start of the text process. Here both packages know where the few
names are that a tokenizer needs. Whoever asks for any other name gets the package as it is.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from threading import get_ident
from types import ModuleType
from typing import Any

PACKAGE = "transformers"
MODELS = f"{PACKAGE}.models"
HOMES = {
    "AutoTokenizer": f"{MODELS}.auto.tokenization_auto",
    "CONFIG_MAPPING": f"{MODELS}.auto.configuration_auto",
    "PreTrainedTokenizer": f"{PACKAGE}.tokenization_utils_sentencepiece",
    "PreTrainedTokenizerFast": f"{PACKAGE}.tokenization_utils_tokenizers",
    "PretrainedConfig": f"{PACKAGE}.configuration_utils",
}
"""Modules of names that are the package's own. A name that has moved is looked for in the whole."""


class Narrow(ModuleType):
    """A package whose `__init__` has not run, and runs when a name is asked for that is neither one
    of `homes` nor a module of it.
    """

    def __init__(self, spec: ModuleSpec, homes: Mapping[str, str]) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__file__ = spec.origin
        self.__path__ = list(spec.submodule_search_locations or [])
        self._homes = homes
        self._loading: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if get_ident() in self._loading or (name.startswith("__") and name != "__all__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if home := self._homes.get(name):
            try:
                return getattr(import_module(home), name)
            except (ImportError, AttributeError):
                return getattr(self._whole(), name)
        module = f"{self.__name__}.{name}"
        if find_spec(module) is not None:
            return import_module(module)
        return getattr(self._whole(), name)

    def _whole(self) -> ModuleType:
        """The package, which takes its own place. Two threads may come here, to the same end."""
        spec = self.__spec__
        if sys.modules[self.__name__] is self and spec is not None and spec.loader is not None:
            self._loading.add(get_ident())
            try:
                spec.loader.exec_module(self)
            finally:
                self._loading.discard(get_ident())
        return sys.modules[self.__name__]


def narrow_transformers() -> None:
    """Call before its first import; after that, or without it, nothing happens."""
    spec = find_spec(PACKAGE)
    if PACKAGE in sys.modules or spec is None:
        return
    package = Narrow(spec, HOMES)
    package.__version__ = version(PACKAGE)  # type: ignore[attr-defined]
    sys.modules[PACKAGE] = package
    models = find_spec(MODELS)
    if models is not None:
        sys.modules[MODELS] = Narrow(models, {})
