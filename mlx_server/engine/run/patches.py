"""Every change that is made to mlx and mlx-lm at run time, and why.

The functions and classes put in place live in their own rooms. Nothing here imports mlx before it
is called: `leave_out_text_side` and the choice of a BLAS come first.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_server.engine.cache.layout import Cache

PACKAGE = "mlx_lm"
TEXT_MODULE = "mlx_lm.tokenizer_utils"
ATTENTION = "scaled_dot_product_attention"


def leave_out_text_side() -> None:
    """Make mlx-lm's models importable without its tokenizers. Call before its first import.

    Replaces the package's `__init__` and `mlx_lm.tokenizer_utils` by empty modules: both bring in
    transformers, three quarters of the time in which an engine of a small model starts.
    `mlx_lm.utils` uses two names of the latter, for text alone. Should a release want more, all is
    put back.
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


def use_cpu_kernels() -> Callable[[], None]:
    """Where MLX computes on a CPU, replace what is slow there; returns what frees its caches.

    `mx.fast.scaled_dot_product_attention` and mlx-lm's `swiglu` become `cpu.attention`'s and
    `cpu.activations`', several times as fast, with outputs that agree to about 1e-6 of their
    scale. Call before a model's module is imported, since that binds `swiglu`. A call with more
    than one token a row evaluates, so it must not be traced (`mx.compile`, `mx.grad`).
    """
    from mlx_server.engine.memory import device_name

    if device_name() != "cpu":
        return _nothing
    import mlx.core as mx
    from mlx_lm.models import activations as originals

    from mlx_server.engine.cpu import activations, attention, heap

    heap.keep_freed()
    mx.fast.scaled_dot_product_attention = attention.attention
    originals.swiglu = activations.swiglu
    return attention.clear_masks


def _nothing() -> None:
    return None


def enable_mixed_passes(model: Any, new_cache: "Callable[[], Cache]") -> str | None:
    """Prepare `model` for `mixed.forward` and try it.

    Returns the obstacle, if there is one; `model` is then as it was. `new_cache` makes an empty
    cache of one sequence.
    """
    from mlx_server.engine.run import mixed

    with ExitStack() as undo:
        try:
            _attend_by_part(model, undo)
            _drop_unanswered_rows(model, undo)
            error = mixed.error(model, new_cache)
        except Exception as failure:  # noqa: BLE001
            # Some families' code asks more of a cache, each in its own way.
            return f"{type(failure).__name__}: {failure}"
        if error > mixed.TOLERANCE:
            return f"logits differ by {error:.2g} of the largest"
        undo.pop_all()
    return None


def _attend_by_part(model: Any, undo: ExitStack) -> None:
    """Wrap mlx-lm's `scaled_dot_product_attention` in the modules of the model's layers.

    They import it by name, and each token of a mixed pass attends to the keys of its own cache.
    """
    from mlx_server.engine.run import mixed

    names = {type(module).__module__ for module in model.modules()}
    homes = [home for name in names if hasattr(home := sys.modules.get(name), ATTENTION)]
    for home in homes:
        original = getattr(home, ATTENTION)
        setattr(home, ATTENTION, mixed.attention_by_part(original))
        undo.callback(setattr, home, ATTENTION, original)


def _drop_unanswered_rows(model: Any, undo: ExitStack) -> None:
    """Give the body a subclass of its class, so that a chunk's rows miss the output projection."""
    from mlx_server.engine.run import mixed

    body = getattr(model, "language_model", model).model
    kind = type(body)
    body.__class__ = mixed.body_of_answers(kind)
    undo.callback(setattr, body, "__class__", kind)
