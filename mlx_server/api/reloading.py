"""Settings that change while the server runs."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from pydantic import ValidationError
from starlette.datastructures import State

from mlx_server.api.http.limits import RateLimits
from mlx_server.config import Settings
from mlx_server.errors import BadRequest
from mlx_server.events import event, set_levels
from mlx_server.keys import ALL_SCOPES, KeyRing, KeysError
from mlx_server.models.store.sources import ModelSources

KEYS = frozenset({"api_keys", "admin_keys", "keys_file"})
LIMITS = frozenset({"requests_per_minute", "tokens_per_minute"})
MODELS = frozenset({"aliases", "model_dirs", "adapters"})
LEVELS = frozenset({"log_level", "log_levels"})
RELOADED = KEYS | LIMITS | MODELS | LEVELS

log = logging.getLogger("mlx_server.server")


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Names of settings; the keys of a file may have changed too."""

    changed: list[str]
    need_restart: list[str]


class Reloader:
    """`state` is the application's; `reread` gives settings as a start would find them now."""

    def __init__(self, state: State, reread: Callable[[], Settings]) -> None:
        self._state = state
        self._reread = reread
        self._lock = asyncio.Lock()

    async def reload(self) -> Reloaded:
        """All or nothing. Raises BadRequest for settings that are wrong."""
        async with self._lock:
            old = cast(Settings, self._state.settings)
            new, keys = await asyncio.to_thread(self._checked)
            self._refuse_to_open(keys)
            different = [
                name for name in Settings.model_fields if getattr(old, name) != getattr(new, name)
            ]
            changed = [name for name in different if name in RELOADED]
            await self._apply(old.model_copy(update={n: getattr(new, n) for n in changed}), keys)
            # A start may have chosen the ports itself.
            chosen = RELOADED | {"port", "ollama_port", "models"}
            result = Reloaded(changed, [name for name in different if name not in chosen])
        log.info(event("reloaded", changed=",".join(result.changed)))
        return result

    async def reload_or_log(self) -> None:
        try:
            await self.reload()
        except BadRequest as error:
            log.error(event("reload_refused", reason=error.message))

    def _checked(self) -> tuple[Settings, KeyRing]:
        try:
            new = self._reread()
            return new, KeyRing.load(new.api_keys, new.admin_keys, new.keys_file)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            message = error.errors(include_input=False)[0]["msg"]
            raise BadRequest(f"setting {where}: {message}") from None
        except (KeysError, OSError, ValueError) as error:
            raise BadRequest(str(error)) from None

    def _refuse_to_open(self, keys: KeyRing) -> None:
        before = cast(KeyRing, self._state.keys)
        if any(before.guards(scope) and not keys.guards(scope) for scope in ALL_SCOPES):
            raise BadRequest("Without these keys the server would be open: that needs a restart.")

    async def _apply(self, settings: Settings, keys: KeyRing) -> None:
        state, old = self._state, cast(Settings, self._state.settings)
        state.settings = settings
        state.keys = keys
        if any(getattr(old, name) != getattr(settings, name) for name in LIMITS):
            state.limits = RateLimits(settings.requests_per_minute, settings.tokens_per_minute)
        set_levels(settings.log_level, settings.log_levels)
        state.catalog.sources = ModelSources.of(settings)
        state.catalog.refresh()
        await state.pool.reread_entries()
