"""What the texts of MLX's errors say of the device, and when an engine must end."""

import pytest

from mlx_server.engine.faults import (
    MOST_IN_A_ROW,
    DeviceGone,
    FailingTurns,
    is_gone,
    is_out_of_memory,
)


def metal(reason: str) -> str:
    return f"[METAL] Command buffer execution failed: {reason}."


CUBLAS = (
    "cublasLtMatmul( handle_, matmul_desc_, alpha_ptr, b,\n encoder.stream()) failed with code: "
)
LAUNCH = "cudaGraphLaunch(graph_exec, stream_) failed: "
SYNC = "cudaStreamSynchronize(stream_) failed: "

NO_MEMORY = [
    "[malloc] Unable to allocate 123 bytes.",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    metal("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    CUBLAS + "3.",
    "cublasLtCreate(&handle) failed: CUBLAS_STATUS_ALLOC_FAILED.",
    "cudnnCreate(&handle) failed: CUDNN_STATUS_ALLOC_FAILED.",
    "cudnnExecute() failed: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.",
]
GONE = [
    metal(
        "Ignored (for causing prior/excessive GPU errors) "
        "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
    ),
    metal("Ignored (00000004:kIOAccelCommandBufferCallbackErrorSubmissionsIgnored)"),
    metal("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"),
    metal("Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)"),
    "[metal::load_device] No Metal device available.",
    *(
        SYNC + reason
        for reason in (
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
            "Invalid access of peer GPU memory over nvlink or a hardware error",
            "the MPS client has been terminated by the server",
            "an async error has occured in external entity outside of CUDA",
            "uncorrectable ECC error encountered",
            "uncorrectable NVLink error detected during the execution",
            "context is destroyed",
            "no CUDA-capable device is detected",
            "CUDA-capable device(s) is/are busy or unavailable",
            "driver shutting down",
            "unknown error",
        )
    ),
]
PASSING = [
    metal("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"),
    metal(
        "Discarded (victim of GPU error/recovery) "
        "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"
    ),
    metal(
        "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
    ),
    metal("Internal Error (0000000e:Internal Error)"),
    LAUNCH + "invalid argument",
    CUBLAS + "13.",
    "Cache thrashing is happening, please set the environment variable X to a larger value than 5.",
    "CUDA driver version is insufficient for CUDA runtime version",
    "[matmul] Last dimension of first input with shape (1,2) must match second to last dimension.",
    "this prompt cannot be computed",
]


@pytest.mark.parametrize("text", NO_MEMORY)
def test_a_lack_of_memory_is_known_by_what_metal_cuda_and_the_cpu_say(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_gone(RuntimeError(text))


@pytest.mark.parametrize("text", GONE)
def test_a_device_that_is_gone_is_known_by_its_error(text: str) -> None:
    assert is_gone(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text))
    with pytest.raises(DeviceGone):
        FailingTurns(lambda: True).failed(RuntimeError(text), smaller=True)


@pytest.mark.parametrize("text", PASSING)
def test_other_errors_are_neither(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))
    assert not is_gone(RuntimeError(text))
    FailingTurns(lambda: True).failed(RuntimeError(text))


def test_a_failed_allocation_of_python_is_a_lack_of_memory() -> None:
    assert is_out_of_memory(MemoryError())


def test_a_device_that_adds_no_more_is_gone_whatever_it_says() -> None:
    with pytest.raises(DeviceGone, match="some words"):
        FailingTurns(lambda: False).failed(RuntimeError("some words"), smaller=True)


def test_turns_that_fail_in_a_row_with_nothing_smaller_to_try_end_the_engine() -> None:
    turns = FailingTurns(lambda: True)
    error = RuntimeError("[malloc] Unable to allocate 1 bytes.")
    for _ in range(5):
        for _ in range(MOST_IN_A_ROW - 1):
            turns.failed(error)
        turns.failed(error, smaller=True)
        turns.worked()
    for _ in range(MOST_IN_A_ROW - 1):
        turns.failed(error)
    with pytest.raises(DeviceGone, match="in a row"):
        turns.failed(error)
