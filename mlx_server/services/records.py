"""What is kept of answers and conversations, in one SQLite file that servers may share."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from mlx_server.errors import NotFound, Unavailable
from mlx_server.events import event

BUSY_SECONDS = 10.0
PRUNE_SECONDS = 60.0
KEPT_SHARE = 0.9
"""Of the limit, once it was passed."""
OVERHEAD = 200
"""Bytes that an entry costs besides its texts, about."""
TABLES = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA foreign_keys = ON;
PRAGMA journal_size_limit = 1048576;
CREATE TABLE IF NOT EXISTS records (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, previous TEXT,
    used REAL NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    record TEXT NOT NULL REFERENCES records ON DELETE CASCADE, position INTEGER NOT NULL,
    id TEXT NOT NULL, output INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (record, position)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_by_use ON records (used, size);
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
"""

log = logging.getLogger(__name__)

Kind = Literal["response", "conversation"]
Work = TypeVar("Work")


class RecordNotFound(NotFound):
    code = "not_found"


class RecordsFailed(Unavailable):
    code = "storage_failed"

    def __init__(self, error: Exception) -> None:
        super().__init__(f"What was to be kept could not be: {error}.")


@dataclass(frozen=True, slots=True)
class KeptItem:
    id: str
    body: bytes
    """JSON."""
    output: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """`previous` is the record that this one goes on from."""

    id: str
    kind: Kind
    body: bytes
    """JSON."""
    previous: str | None = None


class Records:
    """Bounded in bytes, and in seconds since an entry was used. Each owner sees its own only. All
    work is done in a thread, one thing after the other; methods raise RecordsFailed.
    """

    def __init__(self, path: Path, limit: int, age: float | None) -> None:
        self._path = path
        self._limit = limit
        self._age = age
        self._pruned = 0.0
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")

    async def close(self) -> None:
        def work() -> None:
            if self._connection is not None:
                self._connection.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._thread.shutdown(wait=False)

    async def keep(
        self, owner: str, record: Record, items: Sequence[KeptItem], within: str | None = None
    ) -> None:
        """A new record with its items, which also become the last of conversation `within`."""

        def work(connection: sqlite3.Connection) -> None:
            _insert(connection, owner, record)
            _append(connection, record.id, items)
            if within is not None:
                _found(connection, owner, within, "conversation")
                _append(connection, within, items)
            self._prune(connection)

        await self._run(work)

    async def find(self, owner: str, id: str, kind: Kind) -> Record:
        """Raises RecordNotFound."""
        return await self._run(lambda connection: _found(connection, owner, id, kind))

    async def change(self, owner: str, record: Record) -> None:
        """Its body. Raises RecordNotFound."""

        def work(connection: sqlite3.Connection) -> None:
            _found(connection, owner, record.id, record.kind)
            connection.execute("UPDATE records SET body = ? WHERE id = ?", (record.body, record.id))

        await self._run(work)

    async def delete(self, owner: str, id: str, kind: Kind) -> None:
        """Raises RecordNotFound."""

        def work(connection: sqlite3.Connection) -> None:
            _found(connection, owner, id, kind)
            connection.execute("DELETE FROM records WHERE id = ?", (id,))
            connection.execute("PRAGMA incremental_vacuum").fetchall()

        await self._run(work)

    async def items(self, owner: str, id: str, kind: Kind) -> list[KeptItem]:
        """In order. Raises RecordNotFound."""

        def work(connection: sqlite3.Connection) -> list[KeptItem]:
            _found(connection, owner, id, kind)
            _touch(connection, [id])
            return _items(connection, id)

        return await self._run(work)

    async def said_until(self, owner: str, id: str) -> list[KeptItem]:
        """The items of a response and of all that it goes on from, oldest first. Raises
        RecordNotFound.
        """

        def work(connection: sqlite3.Connection) -> list[KeptItem]:
            chain: list[str] = []
            at: str | None = id
            while at is not None:
                record = _found(connection, owner, at, "response")
                chain.append(at)
                at = record.previous
            _touch(connection, chain)
            return [item for one in reversed(chain) for item in _items(connection, one)]

        return await self._run(work)

    async def append(self, owner: str, conversation: str, items: Sequence[KeptItem]) -> None:
        """Raises RecordNotFound."""

        def work(connection: sqlite3.Connection) -> None:
            _found(connection, owner, conversation, "conversation")
            _append(connection, conversation, items)
            self._prune(connection)

        await self._run(work)

    async def delete_item(self, owner: str, conversation: str, id: str) -> None:
        """Raises RecordNotFound."""

        def work(connection: sqlite3.Connection) -> None:
            _found(connection, owner, conversation, "conversation")
            where = "DELETE FROM items WHERE record = ? AND id = ?"
            if not connection.execute(where, (conversation, id)).rowcount:
                raise _missing("item", id)

        await self._run(work)

    async def find_items(self, owner: str, ids: Sequence[str]) -> dict[str, KeptItem]:
        """Wherever they were said. Raises RecordNotFound."""

        def work(connection: sqlite3.Connection) -> dict[str, KeptItem]:
            found = {}
            for id in ids:
                row = connection.execute(
                    "SELECT items.id, items.body, output FROM items JOIN records"
                    " ON records.id = record WHERE items.id = ? AND owner = ?",
                    (id, owner),
                ).fetchone()
                if row is None:
                    raise _missing("item", id)
                found[id] = KeptItem(row[0], row[1], bool(row[2]))
            return found

        return await self._run(work)

    # In the thread.

    async def _run(self, work: Callable[[sqlite3.Connection], Work]) -> Work:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def _do(self, work: Callable[[sqlite3.Connection], Work]) -> Work:
        try:
            if self._connection is None:
                self._connection = _connect(self._path)
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, OSError) as error:
            log.error(event("records_failed", path=self._path, error=error))
            raise RecordsFailed(error) from error
        return result

    def _prune(self, connection: sqlite3.Connection) -> None:
        now = time.time()
        [size] = connection.execute("SELECT coalesce(sum(size), 0) FROM records").fetchone()
        if size <= self._limit and now - self._pruned < PRUNE_SECONDS:
            return
        self._pruned = now
        if self._age is not None:
            connection.execute("DELETE FROM records WHERE used < ?", (now - self._age,))
        if size > self._limit:
            connection.execute(
                "DELETE FROM records WHERE id IN (SELECT id FROM (SELECT id, sum(size) OVER"
                " (ORDER BY used DESC, id) AS newer FROM records) WHERE newer > ?)",
                (int(self._limit * KEPT_SHARE),),
            )
        connection.execute("PRAGMA incremental_vacuum").fetchall()


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # what people say is theirs; SQLite gives its other files the same mode
    # Transactions are begun and ended in words.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        with closing(connection.executescript(TABLES)):
            return connection
    except BaseException:
        connection.close()
        raise


def _missing(kind: str, id: str) -> RecordNotFound:
    return RecordNotFound(f"There is no {kind} '{id[:128]}'; it may have been deleted.")


def _found(connection: sqlite3.Connection, owner: str, id: str, kind: Kind) -> Record:
    row = connection.execute(
        "SELECT body, previous FROM records WHERE id = ? AND owner = ? AND kind = ?",
        (id, owner, kind),
    ).fetchone()
    if row is None:
        raise _missing(kind, id)
    return Record(id, kind, row[0], row[1])


def _insert(connection: sqlite3.Connection, owner: str, record: Record) -> None:
    connection.execute(
        "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            *(record.id, owner, record.kind, record.previous),
            *(time.time(), OVERHEAD + len(record.body), record.body),
        ),
    )


def _append(connection: sqlite3.Connection, record: str, items: Sequence[KeptItem]) -> None:
    [last] = connection.execute(
        "SELECT coalesce(max(position), -1) FROM items WHERE record = ?", (record,)
    ).fetchone()
    connection.executemany(
        "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
        [
            (record, last + 1 + index, item.id, item.output, item.body)
            for index, item in enumerate(items)
        ],
    )
    added = sum(OVERHEAD + len(item.body) for item in items)
    connection.execute(
        "UPDATE records SET size = size + ?, used = ? WHERE id = ?", (added, time.time(), record)
    )


def _touch(connection: sqlite3.Connection, ids: Sequence[str]) -> None:
    now = time.time()
    connection.executemany("UPDATE records SET used = ? WHERE id = ?", [(now, id) for id in ids])


def _items(connection: sqlite3.Connection, record: str) -> list[KeptItem]:
    rows = connection.execute(
        "SELECT id, body, output FROM items WHERE record = ? ORDER BY position", (record,)
    )
    return [KeptItem(id, body, bool(output)) for id, body, output in rows]
