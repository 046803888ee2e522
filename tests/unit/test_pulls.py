"""Pulls in a server: shared between those who ask, told as they go, ended with the last one."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_server.errors import BadRequest, ModelNotFound, Unavailable
from mlx_server.models.store.catalog import Catalog
from mlx_server.models.store.pulls import PullManager
from mlx_server.models.store.transfer import Progress
from tests.support.hub import Hub, running
from tests.support.server import until
from tests.support.store import sources_in

REPO = "tiny/llama"
WEIGHTS = random.Random(3).randbytes(1_500_000)
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub({REPO: dict(FILES)})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(sources_in(tmp_path / "home", aliases={"mine": REPO}))


@pytest.fixture
async def pulls(catalog: Catalog) -> AsyncIterator[PullManager]:
    manager = PullManager(catalog)
    yield manager
    await manager.stop()


async def followed(pulls: PullManager, name: str = REPO) -> list[Progress]:
    async with pulls.follow(name) as updates:
        return [progress async for progress in updates]


async def test_a_pull_ends_with_a_model_that_can_be_served(
    hub: Hub, pulls: PullManager, catalog: Catalog
) -> None:
    assert catalog.entries() == []
    seen = await followed(pulls)
    assert (seen[-1].done, seen[-1].total) == (len(WEIGHTS) + 23, len(WEIGHTS) + 23)
    assert catalog.find(REPO).path is not None
    assert pulls.statuses() == []


async def test_several_who_ask_share_one_download(hub: Hub, pulls: PullManager) -> None:
    everybody = await asyncio.gather(*(followed(pulls, name) for name in (REPO, "mine", REPO)))
    assert len(hub.downloads("model.safetensors")) == 1
    assert all(seen[-1].done == seen[-1].total > 0 for seen in everybody)


async def test_a_pull_goes_on_for_those_who_stay(hub: Hub, pulls: PullManager) -> None:
    hub.pace = 0.05
    staying = asyncio.create_task(followed(pulls))
    async with pulls.follow(REPO) as updates:
        async for progress in updates:
            if progress.done:
                break
    hub.pace = 0
    assert (await staying)[-1].done > len(WEIGHTS)
    assert len(hub.downloads("model.safetensors")) == 1


async def test_a_pull_nobody_follows_any_more_ends_and_the_next_one_resumes_it(
    hub: Hub, pulls: PullManager, catalog: Catalog
) -> None:
    hub.pace = 0.05
    async with pulls.follow(REPO) as updates:
        async for progress in updates:
            if progress.done:
                break
    assert [status.model for status in pulls.statuses()] == [REPO]

    async def ended() -> bool:
        return not pulls.statuses()

    await until(ended, 10)
    assert catalog.entries() == []
    hub.pace = 0
    await followed(pulls)
    assert hub.downloads("model.safetensors")[-1] is not None
    path = catalog.find(REPO).path
    assert path is not None
    assert (path / "model.safetensors").read_bytes() == WEIGHTS


async def test_who_asks_right_after_a_cancelled_pull_gets_the_model(
    hub: Hub, pulls: PullManager, catalog: Catalog
) -> None:
    hub.pace = 0.05
    async with pulls.follow(REPO):
        pass
    hub.pace = 0
    assert (await followed(pulls))[-1].done > len(WEIGHTS)
    assert catalog.find(REPO).path is not None


async def test_a_failed_pull_is_remembered_until_the_next_one(hub: Hub, pulls: PullManager) -> None:
    hub.gated.add(REPO)
    for _ in range(2):
        with pytest.raises(Exception, match="gated"):
            await followed(pulls)
    (status,) = pulls.statuses()
    assert status.model == REPO
    assert status.error is not None
    assert "gated" in status.error
    hub.gated.clear()
    await followed(pulls)
    assert pulls.statuses() == []


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "model.gguf", ""])
async def test_paths_are_never_pulled(pulls: PullManager, name: str) -> None:
    with pytest.raises(ModelNotFound):
        await followed(pulls, name)
    assert pulls.statuses() == []


async def test_addresses_are_never_pulled(pulls: PullManager) -> None:
    with pytest.raises(BadRequest):
        await followed(pulls, "http://127.0.0.1/a/b")


async def test_stopping_ends_the_pulls_under_way(hub: Hub, pulls: PullManager) -> None:
    hub.pace = 0.05
    following = asyncio.create_task(followed(pulls))

    async def begun() -> bool:
        return bool(hub.downloads("model.safetensors"))

    await until(begun, 10)
    await pulls.stop()
    with pytest.raises(Unavailable):
        await following
    with pytest.raises(Unavailable):
        await followed(pulls)
