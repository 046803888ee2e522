"""API keys: reading, scopes, and lookup."""

import hmac
import logging
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from mlx_server.events import event

Scope = Literal["inference", "admin"]
ALL_SCOPES: frozenset[Scope] = frozenset({"inference", "admin"})

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SHA256 = re.compile(r"[0-9a-fA-F]{64}")

log = logging.getLogger(__name__)


class KeysError(ValueError):
    """The message never shows a key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Stored as SHA-256. Scope `admin` permits everything."""

    name: str
    digest: bytes = field(repr=False)
    scopes: frozenset[Scope]

    def permits(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class KeyRing:
    def __init__(self, keys: Sequence[ApiKey], guarded: frozenset[Scope]) -> None:
        _check_unique(keys)
        self._keys = tuple(keys)
        self._guarded = guarded

    @classmethod
    def load(
        cls,
        api_keys: Sequence[SecretStr] = (),
        admin_keys: Sequence[SecretStr] = (),
        keys_file: Path | None = None,
    ) -> Self:
        """`api_keys` also permit `admin` if no other key does. Raises KeysError."""
        listed = [*_keys_file(keys_file)] if keys_file else []
        admins = [*_numbered("admin_keys", "admin", admin_keys, frozenset({"admin"}))]
        has_admin = any(key.permits("admin") for key in [*listed, *admins])
        scopes: frozenset[Scope] = frozenset({"inference"}) if has_admin else ALL_SCOPES
        keys = [*listed, *admins, *_numbered("api_keys", "key", api_keys, scopes)]
        used = frozenset(scope for key in keys for scope in key.scopes)
        return cls(keys, ALL_SCOPES if listed else used)

    def guards(self, scope: Scope) -> bool:
        """Whether `scope` needs a key: `admin_keys` alone leave inference open."""
        return scope in self._guarded

    def find(self, shown: str) -> ApiKey | None:
        """Constant time over all keys, so that timing reveals nothing."""
        # Headers arrive as Latin-1.
        digest = sha256(shown.encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, key.digest) for key in self._keys]
        return self._keys[matches.index(True)] if any(matches) else None


def warn_if_exposed(keys_file: Path | None) -> None:
    """Log if other users of this machine can read the file."""
    if keys_file and os.name == "posix" and keys_file.stat().st_mode & 0o077:
        log.warning(event("keys_file_readable_by_others", path=keys_file, hint="chmod 600"))


def _numbered(
    setting: str, prefix: str, keys: Sequence[SecretStr], scopes: frozenset[Scope]
) -> Iterator[ApiKey]:
    for index, key in enumerate(keys):
        secret = key.get_secret_value()
        if not secret.strip():
            raise KeysError(f"setting {setting}: a key must not be empty")
        yield ApiKey(f"{prefix}-{index}", sha256(secret.encode()).digest(), scopes)


def _check_unique(keys: Sequence[ApiKey]) -> None:
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise KeysError(f"two keys have the name {name}")
    owners: dict[bytes, str] = {}
    for key in keys:
        if owners.setdefault(key.digest, key.name) != key.name:
            raise KeysError(f"{owners[key.digest]} and {key.name} are the same key")


# the file


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=NAME)]
    key: SecretStr | None = None
    sha256: SecretStr | None = None
    scopes: Annotated[frozenset[Scope], Field(min_length=1)] = frozenset({"inference"})

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        if self.key is not None and not self.key.get_secret_value().strip():
            raise ValueError("the key is empty")
        if self.sha256 is not None and not SHA256.fullmatch(self.sha256.get_secret_value()):
            raise ValueError("sha256 must be 64 hexadecimal digits")
        return self

    def api_key(self) -> ApiKey:
        if self.key is not None:
            digest = sha256(self.key.get_secret_value().encode()).digest()
        else:
            assert self.sha256 is not None
            digest = bytes.fromhex(self.sha256.get_secret_value())
        return ApiKey(self.name, digest, self.scopes)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: Annotated[list[_Entry], Field(min_length=1)]


def _keys_file(path: Path) -> Iterator[ApiKey]:
    try:
        content = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeysError(f"setting keys_file: {path}: {where}: {first['msg']}") from None
    except OSError as error:
        raise KeysError(f"setting keys_file: {path}: {error.strerror}") from None
    except ValueError as error:  # neither TOML nor UTF-8
        # A decoding error shows bytes of the file, and a TOML error where it is.
        reason = error if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8"
        raise KeysError(f"setting keys_file: {path}: {reason}") from None
    for entry in content.keys:
        yield entry.api_key()
