"""How much of a device's memory models may have, on machines that are not here."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_server.engine.cpu.cgroup import memory_limit
from mlx_server.engine.memory import DeviceMemory, describe, read_device
from mlx_server.engine.protocol import Device
from mlx_server.models.pool.needs import CUDA_CONTEXT, MemoryPlanner

GIB = 1 << 30


def mac(memory: int, recommended: int) -> Device:
    """As MLX describes a Mac of so many GiB."""
    info: dict[str, str | int] = {
        "architecture": "applegpu_g16s",
        "device_name": "Apple M4",
        "max_buffer_length": recommended * 3 // 4,
        "max_recommended_working_set_size": recommended,
        "memory_size": memory * GIB,
        "resource_limit": 499000,
    }
    return describe("metal", info, memory * GIB)


def cuda(total: int, free: int) -> Device:
    info: dict[str, str | int] = {
        "architecture": "sm_90",
        "device_name": "NVIDIA H100",
        "free_memory": free,
        "total_memory": total,
    }
    return describe("cuda", info, 16 * GIB)


MAC_16 = mac(16, 11_453_251_584)
MAC_32 = mac(32, 22_906_503_168)
MAC_128 = mac(128, 103_079_215_104)
CUDA_24 = cuda(24 * GIB, 23 * GIB)
CUDA_SHARED = cuda(24 * GIB, 9 * GIB)
CPU_64 = describe("cpu", {}, 64 * GIB)


@pytest.fixture(autouse=True)
def _mlx_as_before() -> Iterator[None]:
    limit = mx.set_memory_limit(64 * GIB)
    cache = mx.set_cache_limit(GIB)
    yield
    mx.set_memory_limit(limit)
    mx.set_cache_limit(cache)


@pytest.mark.parametrize(
    ("device", "limit", "budget"),
    [
        (MAC_16, "80%", 11_453_251_584),
        (MAC_32, "80%", 22_906_503_168),
        (MAC_128, "80%", 103_079_215_104),
        (MAC_128, "50%", 64 * GIB),
        (MAC_16, "8GB", 8 * GIB),
        (MAC_16, "14GB", 11_453_251_584),
        (mac(16, 15 * GIB), "80%", int(12.8 * GIB)),
        (CUDA_24, "80%", int(19.2 * GIB)),
        (CUDA_SHARED, "80%", 9 * GIB),
        (CUDA_SHARED, "4GB", 4 * GIB),
        (CPU_64, "80%", int(51.2 * GIB)),
    ],
)
def test_models_get_a_share_of_all_memory_but_no_more_than_the_device_lets_them_use(
    device: Device, limit: str, budget: int
) -> None:
    assert device.budget(limit) == budget
    memory = DeviceMemory(limit, None, device=device)
    assert memory.limit == budget == mx.get_memory_limit()
    assert memory.cache_limit == budget // 8


SHRINKING = """
import resource
import mlx.core as mx
from mlx_server.engine.memory import DeviceMemory

memory = DeviceMemory("4GB", None)
rows = mx.zeros((16, 1 << 20))
mx.eval(rows)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for left in range(15, 2, -1):
    rows = rows[mx.array(list(range(left)))]
    mx.eval(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(
    read_device().name != "cpu" or not sys.platform.startswith("linux"), reason="about glibc's heap"
)
def test_on_a_cpu_arrays_that_lose_rows_take_the_memory_of_those_before() -> None:
    command = [sys.executable, "-c", SHRINKING]
    touched = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert touched < 2 * 16 * (4 << 20)  # twice the first array; the 13 have 7 times its size


def test_this_machines_device_can_be_used() -> None:
    device = read_device()
    assert 0 < device.usable <= device.memory


def test_each_engine_on_cuda_needs_memory_for_its_context() -> None:
    planner = MemoryPlanner(None)
    planner.use(CUDA_24, "80%", "auto")
    assert (planner.budget, planner.overhead, planner.on_cpu) == (
        int(19.2 * GIB),
        CUDA_CONTEXT,
        False,
    )
    planner.use(MAC_16, "80%", "auto")
    assert (planner.budget, planner.overhead, planner.on_cpu) == (11_453_251_584, 0, False)
    planner.use(CPU_64, "80%", "auto")
    assert (planner.overhead, planner.on_cpu) == (0, True)


@pytest.mark.parametrize(
    ("device", "wired_memory", "wirable"),
    [
        (MAC_16, "auto", 11_453_251_584),
        (MAC_128, " auto ", 103_079_215_104),
        (MAC_128, "off", 0),
        (MAC_128, "24GB", 24 * GIB),
        (MAC_16, "24GB", 11_453_251_584),
        (CUDA_24, "auto", 0),
        (CPU_64, "8GB", 0),
    ],
)
def test_weights_may_be_wired_on_metal_alone_and_within_what_it_recommends(
    device: Device, wired_memory: str, wirable: int
) -> None:
    planner = MemoryPlanner(None)
    planner.use(device, "80%", wired_memory)
    assert planner.wirable == wirable


def groups(root: Path, own: str, **limits: str) -> Path:
    """A file system with this process in the group `own`; `limits` are files by their path."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for path, limit in limits.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "4294967296"}, 4 * GIB),
        ("0::/\n", {"memory.max": "max", "memory.high": "2147483648"}, 2 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1073741824"}, GIB),
        ("0::/of/the/host\n", {"memory.max": "1073741824"}, GIB),
        ("0::/..\n", {"memory.max": "1073741824"}, GIB),
        (
            "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/y\n",
            {"memory/memory.limit_in_bytes": "1073741824"},
            GIB,
        ),
        (
            "4:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "5", "memory/memory.limit_in_bytes": str(2**63)},
            5,
        ),
        ("", {}, None),
    ],
)
def test_a_containers_limit_is_the_least_of_its_control_groups(
    tmp_path: Path, own: str, limits: dict[str, str], expected: int | None
) -> None:
    assert memory_limit(groups(tmp_path, own, **limits)) == expected


def test_where_there_are_no_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
