"""The file of one KV-cache block: safetensors with a checksum over header and data."""

import hashlib
import json
import math
import os
import stat
import struct
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_server.engine.memory import device_name

FORMAT = "1"
"""Version of the content; files of another version count as damaged."""
LARGEST_BLOCK = 256 << 20
LARGEST_FILE = LARGEST_BLOCK + (1 << 20)
TEMPORARY = ".writing-"
SUFFIX = ".safetensors"

HEADER = struct.Struct("<Q")
START = b'{"__metadata__":{"sha256":"'
DIGEST = slice(HEADER.size + len(START), HEADER.size + len(START) + 64)
"""Where the hexadecimal checksum stands. It covers every byte but itself and `START`."""

DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
    "C64": mx.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
NUMPY_NAMES = {"BOOL": "?", "BF16": "u2"}
"""Where numpy's name differs from the safetensors one. It has no bfloat16."""


class Damaged(Exception): ...


@dataclass(frozen=True, slots=True)
class HostArray:
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def write_block(path: Path, identity: str, key: bytes, arrays: Sequence[HostArray]) -> int:
    """Returns the file's size. Raises OSError.

    The file appears whole or not at all; after a power cut its checksum may be wrong.
    """
    # mkstemp makes files that only their owner may read.
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            size = sum(map(file.write, pack(identity, key, arrays)))
        os.replace(temporary, path)
    except OSError:
        remove_file(Path(temporary))
        raise
    return size


def read_block(path: Path, identity: str, key: bytes) -> list[HostArray]:
    """Raises OSError, or Damaged when the file is not this block's."""
    return unpack(identity, key, _read_file(path))


def remove_file(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def pack(identity: str, key: bytes, arrays: Sequence[HostArray]) -> list[bytes | memoryview]:
    """The parts of a block's file, in order.

    The safetensors package copies while holding the GIL, and cannot checksum its header.
    """
    header: dict[str, object] = {"__metadata__": {"sha256": "", **_metadata(identity, key)}}
    end = 0
    for number, array in enumerate(arrays):
        begin, end = end, end + array.data.nbytes
        offsets = [begin, end]
        header[str(number)] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": offsets}
    rest = json.dumps(header, separators=(",", ":")).encode()[len(START) :]
    rest += b" " * (-(DIGEST.stop + len(rest)) % 8)
    size = HEADER.pack(DIGEST.stop - HEADER.size + len(rest))
    data = [array.data for array in arrays]
    return [size, START, _checksum([size, rest, *data]), rest, *data]


def unpack(identity: str, key: bytes, file: memoryview) -> list[HostArray]:
    """Raises Damaged unless `pack` made the bytes for this block."""
    if file[HEADER.size : DIGEST.start] != START:
        raise Damaged("no header")
    if file[DIGEST] != _checksum([file[: HEADER.size], file[DIGEST.stop :]]):
        raise Damaged("wrong checksum")
    # The file is as it was written, but maybe for another block or by another version.
    (size,) = HEADER.unpack_from(file)
    data = file[HEADER.size + size :]
    try:
        header = json.loads(bytes(file[HEADER.size : HEADER.size + size]))
        metadata = header.pop("__metadata__")
        del metadata["sha256"]
        if metadata != _metadata(identity, key):
            raise Damaged("another block's")
        return [_host_array(tensor, data) for tensor in header.values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"unknown content: {type(error).__name__}") from error


def to_host(array: mx.array) -> HostArray:
    """A view of an evaluated array if contiguous, else a copy; on CUDA always a copy."""
    # There the host moves what it looks at to managed memory, and there it stays.
    buffer: Any = _copied(array) if device_name() == "cuda" else array
    view = memoryview(buffer)
    # numpy takes plain bytes of any dtype, bfloat16 too, with no operation of MLX.
    data = np.frombuffer(view if view.c_contiguous else view.tobytes(), dtype=np.uint8)
    return HostArray(NAMES[array.dtype], tuple(array.shape), data.data)


def to_device(array: HostArray) -> mx.array:
    """A copy that MLX owns; bfloat16 stays lazy."""
    dtype = DTYPES[array.dtype]
    name = NUMPY_NAMES.get(array.dtype) or f"{array.dtype[0].lower()}{dtype.size}"
    numbers = np.frombuffer(array.data, dtype=name).reshape(array.shape)
    numbers = np.require(numbers, requirements=["ALIGNED"])
    if dtype == mx.bfloat16:
        return mx.array(numbers).view(dtype)
    return mx.array(numbers, dtype=dtype)


def _copied(array: mx.array) -> mx.array:
    """Bit by bit; MLX has no operation that is sure to copy."""
    return (array.view(BITS[array.itemsize]) | 0).view(array.dtype)


def _metadata(identity: str, key: bytes) -> dict[str, str]:
    return {"format": FORMAT, "identity": identity, "key": key.hex()}


def _host_array(tensor: dict[str, Any], data: memoryview) -> HostArray:
    begin, end = tensor["data_offsets"]
    array = HostArray(tensor["dtype"], tuple(tensor["shape"]), data[begin:end])
    if math.prod(array.shape) * DTYPES[array.dtype].size != array.data.nbytes:
        raise ValueError("its shape does not fit its data")
    return array


def _checksum(parts: Iterable[bytes | memoryview]) -> bytes:
    # SHA-256 is hashlib's fastest where the processor has instructions for it.
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def _read_file(path: Path) -> memoryview:
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
            raise Damaged("no block's file")
        data = np.empty(status.st_size, dtype=np.uint8).data
        rest = data
        while rest:
            count = file.readinto(rest)
            if not count:
                raise Damaged("cut short")
            rest = rest[count:]
    return data


def _open_at_once(path: str, flags: int) -> int:
    # A pipe of this name would block the thread for ever.
    return os.open(path, flags | os.O_NONBLOCK)
