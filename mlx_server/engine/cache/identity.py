"""Names for what a model computes, so that its KV caches are never taken for another's."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from mlx_server.engine.protocol import Load

SAMPLES = 16
SAMPLE_BYTES = 4096


def model_identity(message: Load, layout: str, part: str = "") -> str:
    """A hexadecimal name of the model, its adapter, its options and its layout, and of which `part`
    of it this is, if not all.

    Weight files count by size, time of change and samples: hashing them whole would take longer
    than loading them.
    """
    digest = hashlib.blake2b(digest_size=16)
    options = message.options
    facts = [layout, options.dequantize, str(options.kv_bits), version("mlx-lm"), version("mlx")]
    if part:
        facts.append(part)
    digest.update("\0".join(facts).encode())
    folders = [message.path, *([message.adapter_path] if message.adapter_path else [])]
    for folder in folders:
        files = [*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]
        for file in sorted(files):
            status = file.stat()
            digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            digest.update(_sample(file, status.st_size))
    return digest.hexdigest()


def _sample(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        parts = []
        for number in range(SAMPLES):
            stream.seek(size * number // SAMPLES)
            parts.append(stream.read(SAMPLE_BYTES))
    return b"".join(parts)
