"""Every change made to mlx and mlx-lm at run time, and why; replacements live in their rooms.

Nothing here imports mlx before it is called: `leave_out_text_side` comes first.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_server.engine.cache.layout import Cache

PACKAGE = "mlx_lm"
TEXT_MODULE = "mlx_lm.tokenizer_utils"
HUB = "huggingface_hub"
ATTENTION = "scaled_dot_product_attention"
STATE_SPACE = "ssm_update"
GROUPED_SCORES = "mlx_lm.models.gemma2"
"""Computes attention itself, with the heads that share keys in an axis of their own."""


def leave_out_text_side() -> None:
    """Make mlx-lm's models importable without its tokenizers. Call before its first import.

    Replaces the package's `__init__` and `mlx_lm.tokenizer_utils` by empty modules: both import
    transformers, three quarters of the start of a small model's engine. `mlx_lm.utils` takes two
    names from the latter, for text alone, and one from the hub's client, which it gets when it
    asks. If an import fails so, all is put back.
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
        with _hub_left_out():
            import_module(f"{PACKAGE}.utils")
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


@contextmanager
def _hub_left_out() -> Iterator[None]:
    """Models are folders here; `mlx_lm.utils` imports the hub's client for others."""
    if HUB in sys.modules:
        yield
        return
    hub = ModuleType(HUB)
    vars(hub).update(snapshot_download=_snapshot_download)
    sys.modules[HUB] = hub
    try:
        yield
    finally:
        del sys.modules[HUB]


def _snapshot_download(*arguments: Any, **options: Any) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(*arguments, **options)


def leave_out_generation_config() -> None:
    """Have mlx-lm read config.json alone.

    What else it would read are stop tokens, which are the front's, and a broken
    generation_config.json would end the load.
    """
    from mlx_lm import utils

    def load_config(model_path: Path) -> Any:
        content = (model_path / "config.json").read_text(encoding="utf-8")
        return utils._decode_tagged_floats(json.loads(content))

    utils.load_config = load_config


def use_device_kernels() -> Callable[[], None]:
    """Replace what is slow on MLX's default device; returns what frees its caches.

    Call before a model's module is imported.
    """
    from mlx_server.engine.memory import device_name

    device = device_name()
    if device == "cpu":
        return use_cpu_kernels()
    if device == "cuda":
        use_cuda_products()
    return _nothing


def use_cuda_products() -> None:
    """Read quantized weights once for all rows of a batch: see `cuda.by_rows`."""
    import mlx.core as mx

    from mlx_server.engine.run import cuda

    if hasattr(mx.quantized_matmul, "__wrapped__"):  # a second model finds it done
        return
    mx.quantized_matmul = cuda.by_rows(mx.quantized_matmul, cuda.fewest_rows())
    mx.fast.scaled_dot_product_attention = cuda.attention_of_few(
        mx.fast.scaled_dot_product_attention
    )


def use_cpu_kernels() -> Callable[[], None]:
    """Returns what frees their caches.

    `mx.fast.scaled_dot_product_attention` and mlx-lm's `swiglu` become those of `engine.cpu`,
    several times as fast, equal to about 1e-6 of their scale. A model's module binds `swiglu`
    when it is imported. Calls with more than one token a row evaluate, so they must not be traced
    (`mx.compile`, `mx.grad`).
    """
    import mlx.core as mx
    from mlx_lm.models import activations as originals

    from mlx_server.engine.cpu import activations, attention

    mx.fast.scaled_dot_product_attention = attention.attention
    originals.swiglu = activations.swiglu
    return attention.clear_masks


def keep_states_of_pipeline() -> None:
    """Leave a model's last states to rank 0, which has the last layers and draws.

    mlx-lm gives them to all ranks, by `mx.distributed.all_gather`, for which nothing else is used
    in the process of a model that is divided by layers.
    """
    import mlx.core as mx

    def own(states: mx.array) -> mx.array:
        return states

    mx.distributed.all_gather = own  # type: ignore[assignment]


def _nothing() -> None:
    return None


def mend_padding(model: Any) -> None:
    """Let `model`'s layers compute rows of several lengths together, where they nearly do.

    Nemotron-H masks padding and then takes its states from behind it; Gemma 2 in a batch lays masks
    over the wrong axis.
    """
    from mlx_server.engine.run import padding

    mended: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        home = sys.modules.get(kind.__module__)
        original = getattr(home, STATE_SPACE, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(home, STATE_SPACE, padding.states_at_ends(original))
        if kind.__module__ == GROUPED_SCORES and kind.__name__ == "Attention":
            mended[kind] = mended.get(kind) or padding.masks_by_group(kind)
            module.__class__ = mended[kind]


def enable_mixed_passes(
    model: Any, new_cache: "Callable[[], Cache]", agreed: Callable[[float], float] = float
) -> str | None:
    """Prepare `model` for `mixed.forward` and try it; `agreed` is what all ranks go by.

    Returns the obstacle, if any; `model` is then as it was.
    """
    from mlx_server.engine.run import mixed

    with ExitStack() as undo:
        try:
            _attend_by_part(model, undo)
            _drop_unanswered_rows(model, undo)
            mistake = mixed.mistake(model, new_cache, agreed)
        except Exception as failure:  # noqa: BLE001
            # Some families' code asks more of a cache, each in its own way.
            return f"{type(failure).__name__}: {failure}"
        if mistake is not None:
            return mistake
        undo.pop_all()
    return None


def _attend_by_part(model: Any, undo: ExitStack) -> None:
    """Wrap `scaled_dot_product_attention`, which mlx-lm's modules import by name.

    Each token of a mixed pass attends to its own cache. Models of one module share the wrapper.
    """
    from mlx_server.engine.run import mixed

    names = {type(module).__module__ for module in model.modules()}
    homes = [home for name in names if hasattr(home := sys.modules.get(name), ATTENTION)]
    for home in homes:
        original = getattr(home, ATTENTION)
        if hasattr(original, "__wrapped__"):
            continue
        setattr(home, ATTENTION, mixed.attention_by_part(original))
        undo.callback(setattr, home, ATTENTION, original)


def _drop_unanswered_rows(model: Any, undo: ExitStack) -> None:
    """Subclass the body's class: a chunk's rows need no output projection."""
    from mlx_server.engine.run import mixed

    body = getattr(model, "language_model", model).model
    kind = type(body)
    body.__class__ = mixed.body_of_answers(kind)
    undo.callback(setattr, body, "__class__", kind)
