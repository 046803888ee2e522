"""Amounts as people write them."""

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_bytes(text: str, whole: int) -> int:
    """Bytes meant by `text`: "12GB", "512M", "1024", or a share such as "80%" of `whole`."""
    text = text.strip().upper()
    if text.endswith("%"):
        return int(float(text[:-1]) / 100 * whole)
    number = text.rstrip("KMGTIB ")
    unit = text[len(number) :].strip().rstrip("B").rstrip("I")
    return int(float(number) * _UNITS[unit])
