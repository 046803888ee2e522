"""Fetches models from the Hugging Face hub into its cache."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlx_server.errors import BadRequest, Forbidden, ModelNotFound, ServerError, Unavailable, reason
from mlx_server.models.store.blobs import Blob, ProgressMeter, bytes_present, fetch_blobs
from mlx_server.models.store.folder import WEIGHTS, folder_fault
from mlx_server.models.store.hub_cache import cache_folder, repo_folder
from mlx_server.models.store.locks import write_lock
from mlx_server.models.store.transfer import OnProgress, Progress, Size, check_space

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

PATTERNS = ("*.json", WEIGHTS, "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt")
"""Never code, never pickles."""
POOLING = "*_Pooling/config.json"
"""Of embedding models."""
MAX_HTTP_BYTES = 50_000_000_000
"""Larger files need the hub's own transfer protocol."""


def repo_size(name: str) -> Size:
    """Raises ServerError's family."""
    with _hub_errors(name):
        files = _wanted_files(name).files
    storage = repo_folder(name.partition("@")[0])
    return Size(sum(file.size or 0 for file in files), _missing(files, storage))


def fetch_repo(name: str, on_progress: OnProgress) -> Path:
    """`name` is `org/name[@revision]`. Raises ServerError's family."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    repo, _, revision = name.partition("@")
    revision = revision or "main"
    with _hub_errors(name):
        on_progress(Progress(f"Looking up {name}"))
        commit, files = _wanted_files(name)
        storage = repo_folder(repo)
        total = sum(file.size or 0 for file in files)
        meter = ProgressMeter(f"Downloading {name}", total, on_progress)
        with write_lock(storage):
            check_space(storage, _missing(files, storage))
            fetch_blobs(_blobs(repo, commit, files), storage / "blobs", meter)
            # For good: as a context it would bring them back while another thread still fetches.
            disable_progress_bars()
            folder = snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_folder(),
                endpoint=_endpoint(),
                allow_patterns=[file.rfilename for file in files],
            )
    meter.finish()
    if fault := folder_fault(Path(folder)):
        raise ServerError(f"{name} was downloaded, but {fault}")
    return Path(folder)


def _endpoint() -> str:
    """Explicit, since huggingface_hub reads it once at import."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


class _Wanted(NamedTuple):
    commit: str
    files: list["RepoSibling"]


def _wanted_files(name: str) -> _Wanted:
    from huggingface_hub import HfApi

    repo, _, revision = name.partition("@")
    info = HfApi(endpoint=_endpoint()).model_info(
        repo, revision=revision or "main", files_metadata=True
    )
    return _Wanted(str(info.sha), _model_files(name, info.siblings or []))


def _model_files(name: str, siblings: list["RepoSibling"]) -> list["RepoSibling"]:
    names = {sibling.rfilename for sibling in siblings}
    if "config.json" not in names or not any(fnmatchcase(file, WEIGHTS) for file in names):
        raise BadRequest(
            f"{name} is not a model that MLX loads: it lacks config.json or {WEIGHTS} files"
        )
    return [sibling for sibling in siblings if _is_wanted(sibling.rfilename)]


def _is_wanted(file: str) -> bool:
    patterns = PATTERNS if "/" not in file else (POOLING,)
    return file.count("/") < 2 and any(fnmatchcase(file, pattern) for pattern in patterns)


def _blobs(repo: str, commit: str, files: list["RepoSibling"]) -> list[Blob]:
    """Only large files have checksums."""
    from huggingface_hub import hf_hub_url

    return [
        Blob(
            hf_hub_url(repo, file.rfilename, revision=commit, endpoint=_endpoint()),
            file.lfs.size,
            file.lfs.sha256,
        )
        for file in files
        if file.lfs is not None and file.lfs.size <= MAX_HTTP_BYTES
    ]


def _missing(files: list["RepoSibling"], storage: Path) -> int:
    """Bytes that are still to be downloaded."""
    missing = 0
    for file in files:
        blob = file.lfs.sha256 if file.lfs else file.blob_id
        present = bytes_present(storage / "blobs" / blob) if blob else 0
        missing += max((file.size or 0) - present, 0)
    return missing


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
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
        said = reason(error).splitlines()[0]
        raise Unavailable(f"cannot reach the hub at {_endpoint()}: {said}") from error
    except errors.HfHubHTTPError as error:
        raise Unavailable(f"the hub answered {error.response.status_code} for {name}") from error
    except errors.HFValidationError as error:
        raise BadRequest(f"{name} is no valid hub name") from error
    except json.JSONDecodeError as error:
        raise Unavailable(f"what answers at {_endpoint()} is no model hub") from error
    except OSError as error:
        raise Unavailable(f"downloading {name} failed: {reason(error)}") from error
