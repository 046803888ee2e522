"""Signatures of thinking. One of thinking that is left out of an answer holds it, so that it comes
back with the conversation.
"""

import base64
import binascii
from hashlib import blake2b

MARK = "mlx-thinking:"
DIGEST_BYTES = 16


def digest(thinking: str) -> str:
    return blake2b(thinking.encode(), digest_size=DIGEST_BYTES).hexdigest()


def holding(thinking: str) -> str:
    return MARK + base64.b64encode(thinking.encode()).decode()


def held(signature: str) -> str:
    """The thinking that `holding` was given, or ""."""
    if not signature.startswith(MARK):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
