"""What a failed turn says of the device: that its memory ran out, that it is gone, or neither.

MLX raises the same exceptions for all of it, so that their texts have to tell.
"""

import re
from collections.abc import Callable

MEMORY = re.compile(
    # MLX's allocators, and Metal's limit of buffers
    r"unable to allocate|attempting to allocate|resource limit"
    # a command buffer of Metal, CUDA
    r"|insufficient memory|out ?of ?memory"
    # CUDA's libraries, by name or by number
    r"|_alloc_failed|_allocation_failed|cublas\w*\(.*failed with code: 3\.",
    re.IGNORECASE | re.DOTALL,
)
GONE = (
    # Metal: the process may submit nothing more, or its memory may have been spoilt.
    "callbackerrorsubmissionsignored",
    "callbackerrorhang",
    "callbackerrorpagefault",
    "no metal device",
    # CUDA: the errors after which "the process must be terminated", by cudaGetErrorString.
    "an illegal memory access was encountered",
    "the launch timed out and was terminated",
    "device-side assert triggered",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
    "tensor memory not completely freed",
    "invalid access of peer gpu memory over nvlink or a hardware error",
    "the mps client has been terminated by the server",
    "error has occured in external entity outside of cuda",
    # CUDA: the device or the driver is not there any more.
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "context is destroyed",
    "invalid device context",
    "no cuda-capable device",
    "cuda-capable device(s) is/are busy or unavailable",
    "driver shutting down",
    "failed: unknown error",
)
MOST_IN_A_ROW = 3


class DeviceGone(Exception):
    """Nothing more can be computed in this process."""


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or MEMORY.search(str(error)) is not None


def is_gone(error: Exception) -> bool:
    """Whether the device will fail whatever it is given from now on."""
    text = str(error).lower()
    return any(words in text for words in GONE)


class FailingTurns:
    """Tells the failures of requests from the end of the device, of which `works` asks."""

    def __init__(self, works: Callable[[], bool]) -> None:
        self._works = works
        self._in_a_row = 0

    def worked(self) -> None:
        self._in_a_row = 0

    def failed(self, error: Exception, *, smaller: bool = False) -> None:
        """A turn raised `error`. Raises DeviceGone when no other should be tried.

        `smaller`: there is less to try at once, so that the failure may be one of size.
        """
        if is_gone(error):
            raise DeviceGone(f"the device is gone: {error}") from error
        if not self._works():
            raise DeviceGone(f"the device computes nothing any more since: {error}") from error
        if not smaller:
            self._in_a_row += 1
        if self._in_a_row == MOST_IN_A_ROW:
            raise DeviceGone(f"{MOST_IN_A_ROW} turns in a row failed: {error}") from error
