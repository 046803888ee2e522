"""Sizes and durations as people write them."""

SIZE = r"^\s*\d+(\.\d+)?\s*([KMGT]?i?B?)\s*$"
SIZE_OR_SHARE = r"^\s*\d+(\.\d+)?\s*(%|[KMGT]?i?B?)\s*$"
SIZE_OR_OFF = r"^\s*(off|\d+(\.\d+)?\s*[KMGT]?i?B?)\s*$"
WIRED = r"^\s*(auto|off|\d+(\.\d+)?\s*[KMGT]?i?B?)\s*$"
DURATION = r"^\s*(-1|[0-9]+(\.[0-9]+)?\s*(s|m|h|d)?)\s*$"
"""Matches what `parse_seconds` accepts."""

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str, whole: int) -> int:
    """ "12GB", "512M", "1024", or a share such as "80%" of `whole`."""
    text = text.strip().upper()
    if text.endswith("%"):
        return int(float(text[:-1]) / 100 * whole)
    number = text.rstrip("KMGTIB ")
    unit = text[len(number) :].strip().rstrip("B").rstrip("I")
    return int(float(number) * _UNITS[unit])


def parse_seconds(text: str) -> float | None:
    """ "90", "90s", "5m", "1h", "2d"; None if negative. Raises ValueError."""
    text = text.strip()
    unit = _SECONDS.get(text[-1:])
    seconds = float(text[:-1]) * unit if unit else float(text)
    return seconds if seconds >= 0 else None
