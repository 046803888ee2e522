"""What is kept of answers: found, bounded, shared, and never half."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mlx_server.services import records as module
from mlx_server.services.records import KeptItem, Record, RecordNotFound, Records, RecordsFailed


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[Records]:
    kept = Records(tmp_path / "kept.db", 1_000_000, None)
    yield kept
    await kept.close()


def item(name: str, size: int = 1) -> KeptItem:
    return KeptItem(name, b'"' + b"a" * size + b'"')


async def test_what_a_response_goes_on_from_is_found_in_order(records: Records) -> None:
    await records.keep("", Record("r1", "response", b"1"), [item("a"), item("b")])
    await records.keep("", Record("r2", "response", b"2", "r1"), [item("c")])
    assert [one.id for one in await records.said_until("", "r2")] == ["a", "b", "c"]
    await records.delete("", "r1", "response")
    with pytest.raises(RecordNotFound):
        await records.said_until("", "r2")
    with pytest.raises(RecordNotFound):
        await records.find_items("", ["a"])


async def test_each_owner_sees_its_own_alone(records: Records) -> None:
    await records.keep("ada", Record("r1", "response", b"1"), [item("a")])
    await records.keep("ada", Record("c1", "conversation", b"1"), [])
    attempts: list[Any] = [
        records.find("bob", "r1", "response"),
        records.said_until("bob", "r1"),
        records.items("bob", "r1", "response"),
        records.delete("bob", "r1", "response"),
        records.find_items("bob", ["a"]),
        records.append("bob", "c1", [item("b")]),
        records.change("bob", Record("c1", "conversation", b"2")),
        records.find("ada", "r1", "conversation"),
    ]
    for attempt in attempts:
        with pytest.raises(RecordNotFound):
            await attempt


async def test_two_servers_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    servers = [Records(tmp_path / "kept.db", 1_000_000, None) for _ in range(2)]
    await servers[0].keep("", Record("c1", "conversation", b"{}"), [])
    await asyncio.gather(
        *(servers[n % 2].append("", "c1", [item(f"i{n}"), item(f"j{n}")]) for n in range(40))
    )
    names = [one.id for one in await servers[1].items("", "c1", "conversation")]
    assert sorted(names) == sorted(f"{kind}{n}" for n in range(40) for kind in "ij")
    assert all(names[at][1:] == names[at + 1][1:] for at in range(0, 80, 2))
    for one in servers:
        await one.close()


async def test_the_longest_unused_go_first_when_too_much_is_kept(tmp_path: Path) -> None:
    records = Records(tmp_path / "kept.db", 100_000, None)
    for n in range(20):
        await records.keep("", Record(f"r{n}", "response", b"a" * 9_000), [item(f"i{n}")])
        await records.items("", "r0", "response")
    assert (await records.find("", "r0", "response")).body
    assert (await records.find("", "r19", "response")).body
    with pytest.raises(RecordNotFound):
        await records.find("", "r1", "response")
    await records.close()
    assert (tmp_path / "kept.db").stat().st_size < 200_000


async def test_what_was_long_unused_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "kept.db", 100_000, 100.0)
    await records.keep("", Record("old", "response", b""), [])
    later = module.time.time() + 200
    monkeypatch.setattr(module.time, "time", lambda: later)
    await records.keep("", Record("new", "response", b""), [])
    with pytest.raises(RecordNotFound):
        await records.find("", "old", "response")
    assert await records.find("", "new", "response")
    await records.close()


async def test_a_full_disk_is_told_and_leaves_nothing_half(
    records: Records, tmp_path: Path
) -> None:
    await records.keep("", Record("r1", "response", b"1"), [item("a")])
    await records._run(lambda connection: connection.execute("PRAGMA max_page_count = 10"))
    with pytest.raises(RecordsFailed, match="full"):
        await records.keep("", Record("r2", "response", b"2"), [item("b"), item("c", 100_000)])
    with pytest.raises(RecordNotFound):
        await records.find("", "r2", "response")
    assert [one.id for one in await records.said_until("", "r1")] == ["a"]


async def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "kept.db").write_bytes(b"no database" * 1000)
    records = Records(tmp_path / "kept.db", 1_000_000, None)
    with pytest.raises(RecordsFailed):
        await records.keep("", Record("r1", "response", b"1"), [])
    await records.close()


async def test_what_was_kept_outlives_its_server(tmp_path: Path) -> None:
    first = Records(tmp_path / "kept.db", 1_000_000, None)
    await first.keep("", Record("r1", "response", b"1"), [item("a")])
    # No goodbye: as if it had been killed.
    second = Records(tmp_path / "kept.db", 1_000_000, None)
    assert (await second.find("", "r1", "response")).body == b"1"
    for one in (first, second):
        await one.close()
    with sqlite3.connect(tmp_path / "kept.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
