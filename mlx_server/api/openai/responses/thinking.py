"""Thinking that clients keep: sealed, so that what comes back is what was said."""

import hmac
import os
import secrets
import zlib
from base64 import b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mlx_server.errors import BadRequest

MARK = "mlx1."
KEY_BYTES = 32
SEAL_BYTES = 16
MAX_THINKING = 8 * 1024 * 1024


class Sealer:
    """With a key of its own in `folder`, made when first needed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "thinking.key"
        self._key: bytes | None = None

    def sealed(self, text: str) -> str:
        data = zlib.compress(text.encode())
        return MARK + urlsafe_b64encode(self._seal(data) + data).decode()

    def opened(self, sealed: str) -> str | None:
        """None for what another server sealed. Raises BadRequest for what was changed."""
        if not sealed.startswith(MARK):
            return None
        refusal = BadRequest(
            "The encrypted content could not be verified.", code="invalid_encrypted_content"
        )
        try:
            raw = b64decode(sealed.removeprefix(MARK).encode(), b"-_", validate=True)
        except (NotBase64, ValueError):
            raise refusal from None
        seal, data = raw[:SEAL_BYTES], raw[SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(data)):
            raise refusal
        return zlib.decompressobj().decompress(data, MAX_THINKING).decode(errors="ignore")

    def _seal(self, data: bytes) -> bytes:
        if self._key is None:
            self._key = _read_key(self._path)
        return hmac.digest(self._key, data, sha256)[:SEAL_BYTES]


def _read_key(path: Path) -> bytes:
    """A server without a disk to write to has a key until it ends."""
    fresh = secrets.token_bytes(KEY_BYTES)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, whoever else begins now.
        written = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(fresh)
            with suppress(FileExistsError):
                os.link(written, path)
        finally:
            written.unlink(missing_ok=True)
    with suppress(OSError):
        key = path.read_bytes()
        if len(key) == KEY_BYTES:
            return key
    return fresh
