"""How much has been written into a folder today, by all processes that share it.

Each day has a file to which every write appends its size: 8 bytes, little-endian.
"""

import datetime
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SIZE = struct.Struct("<Q")
NAME = re.compile(r"written-\d{4}-\d{2}-\d{2}")


class DailyWrites:
    """At most `limit` bytes a day, or None for no limit. For one thread."""

    def __init__(
        self,
        root: Path,
        limit: int | None,
        today: Callable[[], datetime.date] = datetime.date.today,
    ) -> None:
        self.limit = limit
        self._root = root
        self._today = today
        self._file = Path()
        self._offset = 0
        self._total = 0

    def allows(self, nbytes: int) -> bool:
        if self.limit is None:
            return True
        self._read()
        return self._total + nbytes <= self.limit

    def add(self, nbytes: int) -> None:
        """Raises OSError."""
        if self.limit is not None:
            self._turn_page()
            with self._file.open("ab") as file:
                file.write(SIZE.pack(nbytes))

    def _read(self) -> None:
        """Add up what this and other processes have appended since."""
        self._turn_page()
        try:
            with self._file.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:  # nothing has been written today
            return
        whole = len(data) - len(data) % SIZE.size
        self._offset += whole
        self._total += sum(size for (size,) in SIZE.iter_unpack(data[:whole]))

    def _turn_page(self) -> None:
        file = self._root / f"written-{self._today():%Y-%m-%d}"
        if file == self._file:
            return
        self._file, self._offset, self._total = file, 0, 0
        with suppress(OSError):  # the folder is not there yet, or not ours
            for old in self._root.iterdir():
                if NAME.fullmatch(old.name) and old != file:
                    old.unlink(missing_ok=True)
