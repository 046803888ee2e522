"""Downloads of large files, verified by checksum and resumable across runs, which huggingface_hub's
are not.
"""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlx_server.errors import ServerError, Unavailable
from mlx_server.models.store.transfer import OnProgress, Progress

ATTEMPTS = 5
PARALLEL = 4
CHUNK = 1 << 16
HASHED_CHUNK = 1 << 20
READ_TIMEOUT = 20.0
"""Seconds without data before reconnecting."""
REPORT_INTERVAL = 0.1
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Blob:
    url: str
    size: int
    sha256: str


class Cancelled(Exception): ...


class ProgressMeter:
    """Counts bytes from several threads; reports every 0.1 s."""

    def __init__(self, stage: str, total: int, on_progress: OnProgress) -> None:
        self._stage = stage
        self._total = total
        self._report = on_progress
        self._lock = threading.Lock()
        self._done = 0
        self._next_report = 0.0
        self._cancelled = False

    def add(self, count: int) -> None:
        """`count` may be negative. Raises Cancelled."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._done += count
            if time.monotonic() >= self._next_report:
                self._next_report = time.monotonic() + REPORT_INTERVAL
                self._report(Progress(self._stage, self._done, self._total))

    def finish(self) -> None:
        self._report(Progress(self._stage, self._total, self._total))

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True


def fetch_blobs(blobs: list[Blob], folder: Path, meter: ProgressMeter) -> None:
    """Download into `folder`, named by checksum; the first failure ends all. Raises ServerError for
    damaged data, Unavailable for none, and errors of httpx2 and huggingface_hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="download") as pool:
        waiting = [pool.submit(_fetch, blob, folder / blob.sha256, meter) for blob in blobs]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            meter.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def bytes_present(blob: Path) -> int:
    return max(_size(blob), _size(_part(blob)))


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.part.incomplete")


def _fetch(blob: Blob, target: Path, meter: ProgressMeter) -> None:
    if _size(target) == blob.size:
        meter.add(blob.size)
        return
    target.unlink(missing_ok=True)
    part = _part(target)
    for _ in range(2):
        _resume(blob, part, meter)
        if _sha256(part, meter) == blob.sha256:
            part.rename(target)
            return
        part.unlink()
        meter.add(-blob.size)
    raise ServerError(
        f"{blob.url} arrived twice with another checksum than the hub gives for it:"
        " something on the way changes the data"
    )


def _sha256(file: Path, meter: ProgressMeter) -> str:
    """Raises Cancelled."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(HASHED_CHUNK):
            digest.update(chunk)
            meter.add(0)
    return digest.hexdigest()


def _resume(blob: Blob, part: Path, meter: ProgressMeter) -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    meter.add(min(_size(part), blob.size))
    failures = 0
    while (have := _size(part)) < blob.size:
        failures += 1
        try:
            _receive(blob, part, have, meter)
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if failures >= ATTEMPTS or not _is_transient(error):
                raise
        if _size(part) > have:
            failures = 0
        elif failures >= ATTEMPTS:
            raise Unavailable(f"the hub sends no data for {blob.url}")
        if _size(part) < blob.size:
            time.sleep(0.2 * 2**failures)


def _is_transient(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code in TRANSIENT


def _receive(blob: Blob, part: Path, have: int, meter: ProgressMeter) -> None:
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream(
        "GET", blob.url, headers=headers, follow_redirects=True, timeout=READ_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        # A server that ignores the range sends everything.
        mode = "ab" if response.status_code == 206 else "wb"
        if mode == "wb":
            meter.add(-have)
        with part.open(mode) as output:
            for chunk in response.iter_bytes(CHUNK):
                output.write(chunk)
                meter.add(len(chunk))
