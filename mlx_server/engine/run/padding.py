"""What some of mlx-lm's layers lack to compute rows of several lengths together."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx

MASK = 9
"""The place of `mask` among the arguments of mlx-lm's `ssm_update`; `lengths` comes next."""


def states_at_ends(original: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's `ssm_update`, which takes a row's state from behind its padding unless `lengths` are
    given: they are read from a mask (rows, tokens) that comes without.
    """

    @wraps(original)
    def ssm_update(*arguments: Any, **options: Any) -> Any:
        if len(arguments) == MASK + 1 and arguments[MASK] is not None:
            options.setdefault("lengths", arguments[MASK].sum(axis=-1))
        return original(*arguments, **options)

    return ssm_update


def masks_by_group(kind: type) -> type:
    """Attention whose scores are (rows, kv heads, group, tokens, keys), and its masks, which come
    as (rows, 1, tokens, keys).
    """

    class Attention(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, *args: Any, **options: Any) -> Any:
            if self.repeats > 1 and isinstance(mask, mx.array) and mask.ndim == 4:
                mask = mx.expand_dims(mask, 2)
            return super().__call__(x, mask, *args, **options)

    Attention.__name__, Attention.__module__ = kind.__name__, kind.__module__
    return Attention
