"""Blocks on disk come back as they were written, or not at all."""

import datetime
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import deserialize

from mlx_server.engine.cache import block_file, disk
from mlx_server.engine.cache.block_file import (
    DTYPES,
    TEMPORARY,
    Damaged,
    HostArray,
    pack,
    to_host,
    unpack,
)
from mlx_server.engine.cache.blocks import Block
from mlx_server.engine.cache.daily import DailyWrites
from mlx_server.engine.cache.disk import DiskCache
from mlx_server.engine.cache.disk_tier import DiskTier

ON_CPU = mx.default_device().type == mx.DeviceType.cpu
IDENTITY = "c0ffee00" * 2
OTHER = "deadbeef" * 2
ROOMY = 1 << 30
SECONDS = 60.0
REPO = Path(__file__).parents[2]

OpenCache = Callable[..., DiskCache]


def key_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(4, "little")).digest()[:16]


def block_of(number: int, kib: int = 16) -> list[mx.array]:
    """Two arrays of `kib` / 2 KiB each, always the same for a number."""
    bits = mx.random.randint(0, 1 << 16, (2, 4, kib * 64), key=mx.random.key(number))
    arrays = list(bits.astype(mx.uint16).view(mx.bfloat16))
    mx.eval(arrays)
    return arrays


def content(arrays: list[mx.array]) -> list[tuple[str, tuple[int, ...], bytes]]:
    mx.eval(arrays)
    return [(host.dtype, host.shape, bytes(host.data)) for host in map(to_host, arrays)]


def read_back(cache: DiskCache, *keys: bytes) -> list[list[mx.array]]:
    read = cache.read(keys)
    assert read.wait(SECONDS)
    return read.blocks()


def write_blocks(cache: DiskCache, *numbers: int, kib: int = 16) -> None:
    for number in numbers:
        cache.write(key_of(number), block_of(number, kib))
    wait_until_written(cache)


def wait_until_written(cache: DiskCache) -> None:
    wait_until(lambda: not cache.writer.waiting)


def block_files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def file_of(cache: DiskCache, number: int) -> Path:
    return cache.index.folder / f"{key_of(number).hex()}.safetensors"


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def events(log: pytest.LogCaptureFixture, name: str) -> int:
    return sum(f"event={name} " in record.getMessage() for record in log.records)


def run_here(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Python code that may import this module, in a process of its own."""
    command = [sys.executable, "-c", f"from tests.engine.test_disk_cache import *\n{code}"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=REPO, text=True, stderr=subprocess.PIPE
    )


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[OpenCache]:
    """Opens caches whose folder has been scanned."""
    caches = []

    def open_it(
        identity: str = IDENTITY,
        limit: int = ROOMY,
        root: Path = tmp_path / "kv",
        daily: int | None = None,
    ) -> DiskCache:
        caches.append(DiskCache(root, identity, limit, daily))
        wait_until(lambda: caches[-1].index.unscanned == 0)
        return caches[-1]

    yield open_it
    for cache in caches:
        cache.close()


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if ON_CPU or d != mx.float64])
    def test_every_dtype_comes_back_bit_for_bit(
        self, open_cache: OpenCache, dtype: mx.Dtype
    ) -> None:
        noise = mx.random.randint(0, 2 if dtype == mx.bool_ else 256, (5, 4, 8)).astype(mx.uint8)
        arrays = [
            noise.view(dtype),
            mx.contiguous(noise[1, :3, :]).view(dtype),
            noise.view(dtype).T,
            noise[:1, 0].view(dtype)[0, 0],
            mx.zeros((0, 3), dtype=dtype),
        ]
        mx.eval(arrays)
        cache = open_cache()
        cache.write(key_of(1), arrays)
        wait_until_written(cache)
        (back,) = read_back(cache, key_of(1))
        assert [array.dtype for array in back] == [dtype] * len(arrays)
        assert content(back) == content(arrays)

    def test_blocks_outlive_the_engine_that_wrote_them(self, open_cache: OpenCache) -> None:
        first = open_cache()
        write_blocks(first, *range(5))
        first.close()
        second = open_cache()
        assert all(second.holds(key_of(number)) for number in range(5))
        back = read_back(second, *map(key_of, range(5)))
        assert [content(block) for block in back] == [content(block_of(n)) for n in range(5)]

    def test_reading_stops_at_the_first_block_that_is_missing(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 0, 1, 3)
        assert len(read_back(cache, *map(key_of, range(4)))) == 2

    def test_a_file_removed_by_another_process_is_a_miss_and_no_damage(
        self, open_cache: OpenCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = open_cache()
        write_blocks(cache, 0, 1, 2)
        file_of(cache, 1).unlink()
        assert len(read_back(cache, *map(key_of, range(3)))) == 1
        assert not cache.holds(key_of(1))
        assert events(caplog, "disk_cache_damaged") == 0

    def test_one_read_takes_no_more_than_its_limit_and_the_next_one_the_rest(
        self, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = open_cache()
        write_blocks(cache, *range(5))
        monkeypatch.setattr(disk, "READ_LIMIT", 40 << 10)
        keys = list(map(key_of, range(5)))
        assert cache.read(keys).keys == keys[:2]
        monkeypatch.setattr(disk, "READ_LIMIT", 1)
        assert cache.read(keys[2:]).keys == keys[2:3]

    def test_a_block_is_written_once(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 7)
        first = file_of(cache, 7).stat()
        write_blocks(cache, 7, 7)
        again = file_of(cache, 7).stat()
        assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)

    def test_the_safetensors_package_reads_the_files(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 1)
        (file,) = block_files(cache.index.root)
        tensors = sorted(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]
        assert [
            (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for _, tensor in tensors
        ] == content(block_of(1))

    def test_nobody_else_may_look_at_the_files(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 1)
        (file,) = block_files(cache.index.root)
        paths = (cache.index.root, cache.index.folder, file)
        modes = [stat.S_IMODE(path.stat().st_mode) for path in paths]
        assert modes == [0o700, 0o700, 0o600]


class TestWear:
    """Disks bear only so many writes."""

    def test_processes_share_a_day_s_limit_and_the_next_day_begins_anew(
        self, tmp_path: Path
    ) -> None:
        day = [datetime.date(2026, 11, 26)]
        one, other = (DailyWrites(tmp_path, 1000, lambda: day[0]) for _ in range(2))
        one.add(600)
        assert other.allows(400)
        assert not other.allows(401)
        other.add(400)
        assert not one.allows(1)
        (tmp_path / "written-by-me").touch()
        day[0] += datetime.timedelta(days=1)
        one.add(900)
        assert not other.allows(101)
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "written-2026-11-27",
            "written-by-me",
        ]

    def test_nothing_is_written_beyond_the_day_s_limit(
        self, open_cache: OpenCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = open_cache(daily=40 << 10)
        write_blocks(cache, *range(4))  # of 16 KiB and a header
        assert len(block_files(cache.index.root)) == 2
        figures = cache.figures()
        assert (figures.blocks, figures.refused_blocks) == (2, 2)
        assert 32 << 10 < figures.written_bytes <= 40 << 10
        assert not cache.willing
        assert events(caplog, "disk_cache_unwritable") == 1

    def test_closing_writes_what_there_is_though_more_than_may_wait(
        self, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk, "QUEUE_LIMIT", 40 << 10)
        cache = open_cache()
        blocks = [Block(key_of(n), b"", [], block_of(n)) for n in range(20)]
        cache.close(blocks)
        assert len(block_files(cache.index.root)) == 20

    def test_a_disk_that_refuses_files_is_not_asked_for_each_block(
        self, open_cache: OpenCache
    ) -> None:
        cache = open_cache(daily=0)
        tier = DiskTier(cache)
        blocks = [Block(key_of(n), b"", [], block_of(n)) for n in range(50)]
        assert tier.save(blocks) is None
        wait_until(lambda: not cache.willing)
        assert tier.save(blocks) is None
        assert not block_files(cache.index.root)


class TestDamage:
    @pytest.fixture
    def packed(self) -> bytes:
        small = mx.arange(24, dtype=mx.float16)
        mx.eval(small)
        return b"".join(pack(IDENTITY, key_of(1), [to_host(small)]))

    def test_every_flipped_bit_is_noticed(self, packed: bytes) -> None:
        assert unpack(IDENTITY, key_of(1), memoryview(packed))
        for bit in range(len(packed) * 8):
            flipped = bytearray(packed)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(Damaged):
                unpack(IDENTITY, key_of(1), memoryview(flipped))

    def test_every_missing_end_is_noticed(self, packed: bytes) -> None:
        for length in range(len(packed)):
            with pytest.raises(Damaged):
                unpack(IDENTITY, key_of(1), memoryview(packed)[:length])

    @pytest.mark.parametrize(
        "array",
        [
            HostArray("F32", (3,), memoryview(bytes(8))),
            HostArray("F4", (8,), memoryview(bytes(4))),
            HostArray("F32", ("2",), memoryview(bytes(8))),  # type: ignore[arg-type]
        ],
    )
    def test_what_makes_no_array_is_damaged_though_its_checksum_is_right(
        self, array: HostArray
    ) -> None:
        with pytest.raises(Damaged):
            unpack(IDENTITY, key_of(1), memoryview(b"".join(pack(IDENTITY, key_of(1), [array]))))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(b"\xff" * 4096),
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            lambda file: file.write_bytes(file.read_bytes() + b"\0"),
            lambda file: file.write_bytes(file.read_bytes()[:-9] + b"damaged??"),
            lambda file: os.truncate(file, 1 << 40),
        ],
        ids=["empty", "noise", "short", "long", "changed", "huge"],
    )
    def test_a_damaged_file_is_a_miss_then_gone_then_written_anew(
        self,
        open_cache: OpenCache,
        caplog: pytest.LogCaptureFixture,
        damage: Callable[[Path], object],
    ) -> None:
        first = open_cache()
        write_blocks(first, 1)
        (file,) = block_files(first.index.root)
        damage(file)
        cache = open_cache(limit=1 << 50)
        for _ in range(2):
            assert read_back(cache, key_of(1)) == []
        assert not file.exists()
        assert events(caplog, "disk_cache_damaged") == 1
        write_blocks(cache, 1)
        assert content(read_back(cache, key_of(1))[0]) == content(block_of(1))

    def test_files_that_swapped_names_are_misses(
        self, open_cache: OpenCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = open_cache()
        write_blocks(first, 1, 2)
        one, two = block_files(first.index.root)
        one.rename(first.index.root / "aside")
        two.rename(one)
        (first.index.root / "aside").rename(two)
        cache = open_cache()
        assert read_back(cache, key_of(1)) == read_back(cache, key_of(2)) == []
        assert events(caplog, "disk_cache_damaged") == 2

    def test_a_file_of_another_model_is_a_miss(self, open_cache: OpenCache) -> None:
        other = open_cache(OTHER)
        write_blocks(other, 1)
        assert not open_cache().holds(key_of(1))
        other.index.folder.rename(other.index.root / IDENTITY)
        cache = open_cache()
        assert cache.holds(key_of(1))
        assert read_back(cache, key_of(1)) == []

    def test_a_file_of_another_version_is_a_miss(
        self, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(block_file, "FORMAT", "0")
            write_blocks(open_cache(), 1)
        assert read_back(open_cache(), key_of(1)) == []

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
    def test_what_is_no_file_is_a_miss_and_left_alone(
        self, open_cache: OpenCache, make: Callable[[Path], None]
    ) -> None:
        cache = open_cache()
        write_blocks(cache, 1)
        (file,) = block_files(cache.index.root)
        file.unlink()
        make(file)
        assert read_back(cache, key_of(1)) == []
        assert not open_cache().holds(key_of(1))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
    def test_a_file_that_may_not_be_read_is_a_miss(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 1)
        block_files(cache.index.root)[0].chmod(0)
        assert read_back(cache, key_of(1)) == []


class TestLimit:
    LIMIT = 10 * (17 << 10)

    def test_all_models_together_never_exceed_it(self, open_cache: OpenCache) -> None:
        caches = [open_cache(IDENTITY, self.LIMIT), open_cache(OTHER, self.LIMIT)]
        write_blocks(caches[0], *range(8))
        for number in range(20, 40):
            write_blocks(caches[1], number)
            total = sum(file.stat().st_size for file in block_files(caches[0].index.root))
            assert total <= self.LIMIT
        assert caches[1].holds(key_of(39))
        assert caches[1].index.nbytes == total

    def test_what_was_used_least_recently_goes_first(self, open_cache: OpenCache) -> None:
        first = open_cache()
        write_blocks(first, *range(10))
        for number in range(10):
            os.utime(file_of(first, number), (1e9 + number, 1e9 + number))
        cache = open_cache(limit=self.LIMIT)
        assert read_back(cache, key_of(0))
        write_blocks(cache, 10, 11)
        held = [number for number in range(12) if cache.holds(key_of(number))]
        assert held[0] == 0
        assert held[1:] == list(range(12 - len(held) + 1, 12))
        assert block_files(cache.index.root) == sorted(file_of(cache, number) for number in held)

    def test_a_prompt_used_from_memory_stays_and_loses_its_end_first(
        self, open_cache: OpenCache
    ) -> None:
        first = open_cache()
        write_blocks(first, *range(10))
        for file in block_files(first.index.root):
            os.utime(file, (1e9, 1e9))
        cache = open_cache(limit=self.LIMIT)
        cache.touch([key_of(number) for number in range(8)])
        write_blocks(cache, *range(10, 16))
        held = [number for number in range(8) if cache.holds(key_of(number))]
        assert 0 < len(held) < 8
        assert held == list(range(len(held)))

    def test_nothing_but_blocks_is_ever_removed(
        self, open_cache: OpenCache, tmp_path: Path
    ) -> None:
        strangers = [
            tmp_path / "kv" / name
            for name in ("model/model.safetensors", f"{OTHER}/model.safetensors", "00112233")
        ]
        for path in strangers:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(self.LIMIT))
        cache = open_cache(limit=self.LIMIT)
        write_blocks(cache, *range(20))
        assert cache.holds(key_of(19))
        assert all(path.exists() for path in strangers)

    def test_a_block_beyond_the_whole_limit_is_refused_once_and_loudly(
        self, open_cache: OpenCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = open_cache(limit=1 << 10)
        write_blocks(cache, 1, 2)
        assert not block_files(cache.index.root)
        assert events(caplog, "disk_cache_unwritable") == 1


class TestQueue:
    def test_blocks_beyond_the_bound_are_dropped_and_the_others_written_on_close(
        self, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk, "WRITE_RATE", 1)  # the second block waits for hours
        monkeypatch.setattr(disk, "QUEUE_LIMIT", 4 * (16 << 10))
        cache = open_cache()
        cache.write(key_of(0), block_of(0))
        wait_until(lambda: cache.holds(key_of(0)) and not cache.writer.waiting)
        for number in range(1, 20):
            cache.write(key_of(number), block_of(number))
            cache.write(key_of(number), block_of(number))
        assert block_files(cache.index.root) == [file_of(cache, 0)]
        assert cache.writer.waiting == set(map(key_of, range(1, 5)))
        cache.close()
        assert len(block_files(cache.index.root)) == 5
        back = read_back(open_cache(), *map(key_of, range(20)))
        assert [content(block) for block in back] == [content(block_of(n)) for n in range(5)]

    def test_a_closed_cache_does_nothing(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 1)
        cache.close()
        cache.close()
        cache.write(key_of(2), block_of(2))
        assert not cache.writer.waiting
        assert block_files(cache.index.root) == [file_of(cache, 1)]
        assert read_back(cache, key_of(1)) == []

    def test_a_cancelled_read_ends(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, *range(10))
        read = cache.read(list(map(key_of, range(10))))
        read.cancel()
        assert read.wait(SECONDS)
        assert [content(b) for b in read.blocks()] == [
            content(block_of(number)) for number in range(len(read.blocks()))
        ]


FULL_DISK = """
import logging, resource
logging.basicConfig(format="%(message)s")
logging.getLogger("mlx_server.engine").setLevel(logging.INFO)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
disk.RETRY_SECONDS = 0.0
cache = DiskCache(Path(sys.argv[1]), IDENTITY, ROOMY)
write_blocks(cache, 1, 2, 3)
assert not any(cache.holds(key_of(number)) for number in (1, 2, 3))
assert list(cache.index.folder.iterdir()) == []
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
write_blocks(cache, 4)
assert len(read_back(cache, key_of(4))) == 1
"""


class TestTrouble:
    def test_a_full_disk_stops_writing_until_there_is_room(self, tmp_path: Path) -> None:
        process = run_here(FULL_DISK, tmp_path)
        printed = process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 0, printed
        assert [line.split()[0] for line in printed.splitlines()] == [
            "event=disk_cache_unwritable",
            "event=disk_cache_writable",
        ]

    def test_a_folder_that_cannot_be_made_stops_writing_and_nothing_else(
        self, open_cache: OpenCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        cache = open_cache(root=tmp_path / "file")
        write_blocks(cache, 1, 2)
        assert read_back(cache, key_of(1)) == []
        assert not cache.holds(key_of(1))
        assert events(caplog, "disk_cache_unwritable") == 1

    def test_a_folder_removed_meanwhile_is_made_again(self, open_cache: OpenCache) -> None:
        cache = open_cache()
        write_blocks(cache, 1)
        block_files(cache.index.root)[0].unlink()
        cache.index.folder.rmdir()
        cache.index.root.rmdir()
        write_blocks(cache, 2)
        assert len(read_back(cache, key_of(2))) == 1

    def test_leftovers_of_killed_processes_go_and_those_of_running_ones_stay(
        self, open_cache: OpenCache, tmp_path: Path
    ) -> None:
        folder = tmp_path / "kv" / OTHER
        folder.mkdir(parents=True)
        old, new = folder / f"{TEMPORARY}old", folder / f"{TEMPORARY}new"
        old.write_bytes(b"half a blo")
        new.write_bytes(b"half a blo")
        os.utime(old, (1e9, 1e9))
        open_cache()
        assert not old.exists()
        assert new.exists()


KILLED = """
disk.WRITE_RATE = 1 << 40
cache = DiskCache(Path(sys.argv[1]), IDENTITY, ROOMY)
for number in range(1000):
    write_blocks(cache, number, kib=4096)
"""

SHARED = """
first, limit = int(sys.argv[2]), int(sys.argv[3])
blocks_read = 0
cache = DiskCache(Path(sys.argv[1]), IDENTITY, limit)
for number in range(first, first + 60):
    write_blocks(cache, number, number - 20)
    keys = list(map(key_of, range(number - 30, number + 1)))
    while keys:
        read = cache.read(keys)
        assert read.wait(SECONDS)
        for key, block in zip(read.keys, read.blocks()):
            assert key == key_of(number - len(keys) + 1)
            assert content(block) == content(block_of(number - len(keys) + 1))
            keys.pop(0)
            blocks_read += 1
        keys = keys[1:]
assert blocks_read > 60
cache.close()
"""


class TestProcesses:
    def test_two_share_a_folder_and_a_limit(self, tmp_path: Path) -> None:
        limit = 20 * (17 << 10)
        processes = [run_here(SHARED, tmp_path, first, limit) for first in (100, 120)]
        for process in processes:
            printed = process.communicate(timeout=SECONDS)[1]
            assert process.returncode == 0, printed
            assert "disk_cache_damaged" not in printed
        # Either may write a sixteenth before it sees what the other wrote.
        total = sum(file.stat().st_size for file in block_files(tmp_path))
        assert 0 < total <= limit * 18 / 16

    def test_a_kill_while_writing_leaves_nothing_wrong(
        self, tmp_path: Path, open_cache: OpenCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = tmp_path / "kv"
        process = run_here(KILLED, root)
        try:
            wait_until(lambda: len(block_files(root)) > 2 and list(root.glob(f"*/{TEMPORARY}*")))
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=SECONDS)
        cache = open_cache()
        held = [number for number in range(1000) if cache.holds(key_of(number))]
        assert len(held) > 2
        for number in held:
            (back,) = read_back(cache, key_of(number))
            assert content(back) == content(block_of(number, kib=4096))
        assert events(caplog, "disk_cache_damaged") == 0
