"""The admin API over a real server: load, unload, pull, remove, and who may do so."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.test_errors import assert_refused
from tests.support.command import Done, run
from tests.support.hub import Hub, running
from tests.support.server import CHAT, Server, chat, serving, stream_data, until
from tests.support.tiny import build_tiny_adapter, build_tiny_model

PULL = "/admin/models/pull"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden=128, context=512)


@pytest.fixture(scope="module")
def whole_hub() -> Iterator[Hub]:
    with running(Hub({})) as hub:
        yield hub


@pytest.fixture
def hub(whole_hub: Hub) -> Iterator[Hub]:
    """The hub that servers here pull from, as sound as each test finds it."""
    whole_hub.mend()
    yield whole_hub
    whole_hub.release()


@pytest.fixture
def repo(hub: Hub, model: Path) -> str:
    """The tiny model on the hub, under a name that no test before had."""
    name = f"tiny/llama-{len(hub.repos)}"
    hub.repos[name] = {file.name: file.read_bytes() for file in model.iterdir()}
    return name


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, model: Path, whole_hub: Hub
) -> Iterator[Server]:
    """A server with a model, its adapter, and another model in a folder of the operator's."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(model, home / "models" / "tiny")
    build_tiny_adapter(model, home / "adapters" / "tiny" / "poet")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(model, elsewhere / "theirs")
    with pulling_from(whole_hub), serving(home, model_dirs=[str(elsewhere)]) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key for users and one for administrators."""
    keys = {"api_keys": ["user"], "admin_keys": ["boss"]}
    with serving(tmp_path_factory.mktemp("keyed"), **keys) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


@contextmanager
def pulling_from(hub: Hub) -> Iterator[None]:
    """Servers started in the block pull from `hub`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        yield


async def pulled(client: httpx.AsyncClient, model: str) -> list[dict[str, Any]]:
    """The events of a pull, to its end."""
    async with client.stream("POST", PULL, json={"model": model}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [json.loads(data) async for data in stream_data(response)]


async def listed(client: httpx.AsyncClient) -> list[str]:
    return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


@asynccontextmanager
async def half_pulled(server: Server, hub: Hub, repo: str) -> AsyncIterator[None]:
    """A pull that has stopped in the middle of the weights."""
    size = len(hub.repos[repo][WEIGHTS])
    hub.repos[repo].pop("tokenizer.json", None)
    hub.hold_at = size // 2

    async def middle() -> bool:
        return _partial_bytes(server) > size // 4

    async with server.client() as client:
        pulling = asyncio.create_task(pulled(client, repo))
        await until(middle, 20)
        yield
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)


def _partial_bytes(server: Server) -> int:
    return sum(file.stat().st_size for file in server.log.parent.rglob("*.incomplete"))


# load and unload


async def test_a_model_is_loaded_and_unloaded_on_demand(
    server: Server, client: httpx.AsyncClient
) -> None:
    answer = await client.post("/admin/models/tiny/load")
    assert answer.status_code == 200, answer.text
    loaded = answer.json()
    assert (loaded["id"], loaded["state"], loaded["mixed_steps"]) == ("tiny", "ready", "on")
    shared = {"decode": "any length", "prefill": "any length", "reason": None}
    assert loaded["batching"] == shared
    engine = psutil.Process(loaded["pid"])
    assert (await server.models())["tiny"]["state"] == "ready"
    answer = await client.post("/admin/models/tiny/unload")
    assert (answer.status_code, answer.json()["state"]) == (200, "absent")
    assert not engine.is_running()
    again = await client.post("/admin/models/tiny/unload")
    assert (again.status_code, again.json()["state"]) == (200, "absent")


async def test_an_adapter_is_a_model_of_its_own(client: httpx.AsyncClient) -> None:
    texts = []
    for name in ("tiny", "tiny@poet"):
        answer = await client.post(CHAT, json=chat(name, max_tokens=16, ignore_eos=True))
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["message"]["content"])
        assert (await client.post(f"/admin/models/{name}/unload")).status_code == 200
    assert texts[0] != texts[1]


async def test_a_model_is_pinned_and_unpinned(client: httpx.AsyncClient) -> None:
    for action, pinned in (("pin", True), ("unpin", False)):
        answer = await client.post(f"/admin/models/tiny/{action}")
        assert (answer.status_code, answer.json()["pinned"]) == (200, pinned)


@pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient, action: str) -> None:
    answer = await client.post(f"/admin/models/org/nothing/{action}")
    assert assert_refused(answer, 404)["code"] == "model_not_found"


async def test_keep_alive_of_a_request_unloads_the_model_after_it(
    server: Server, client: httpx.AsyncClient
) -> None:
    answer = await client.post(CHAT, json=chat("tiny", max_tokens=1, keep_alive=0))
    assert answer.status_code == 200

    async def gone() -> bool:
        return bool((await server.models())["tiny"]["state"] == "absent")

    await until(gone, 5)
    await client.post(CHAT, json=chat("tiny", max_tokens=1, keep_alive="1h", priority=-1))
    assert (await server.models())["tiny"]["expires"] is not None
    await client.post(CHAT, json=chat("tiny", max_tokens=1, keep_alive="-1"))
    assert (await server.models())["tiny"]["expires"] is None
    await client.post("/admin/models/tiny/unload")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_alive", "soon"),
        ("keep_alive", True),
        ("keep_alive", []),
        ("keep_alive", "5 weeks"),
        ("keep_alive", 10**400),
        ("priority", "high"),
        ("priority", 1.5),
        ("priority", 2**40),
    ],
)
async def test_a_bad_keep_alive_or_priority_is_refused(
    client: httpx.AsyncClient, field: str, value: object
) -> None:
    answer = await client.post(CHAT, json=chat("tiny", **{field: value}))
    assert assert_refused(answer)["param"] == field


# keys


async def test_admin_routes_ask_for_an_admin_key_when_there_are_any(keyed: Server) -> None:
    expected = {None: 401, "stranger": 401, "user": 403, "boss": 200}
    for key, status in expected.items():
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with keyed.client(headers=headers) as client:
            for path in ("/admin/models", "/admin/stats"):
                answer = await client.get(path)
                assert answer.status_code == status, (key, path)
            if status != 200:
                assert_refused(await client.post("/admin/models/tiny/load"), status)
                assert_refused(await client.post("/admin/models/tiny/unload"), status)
                assert_refused(await client.post(PULL, json={"model": "a/b"}), status)
                assert_refused(await client.delete("/admin/models/tiny"), status)
            usual = await client.get("/v1/models")
            assert usual.status_code == (401 if status == 401 else 200), key


async def test_a_web_page_cannot_unload_a_model(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/admin/models/tiny/unload", headers={"Origin": "http://elsewhere.example"}
    )
    assert_refused(answer, 403)


# ps


async def test_ps_shows_what_the_server_holds(server: Server, client: httpx.AsyncClient) -> None:
    port = server.url.rpartition(":")[2]
    for one in await server.models():
        await client.post(f"/admin/models/{one}/unload")
    assert "No model is loaded" in (await _command(server.log.parent, "ps", "--port", port)).stdout
    body = chat("tiny", max_tokens=1, keep_alive="10m")
    assert (await client.post(CHAT, json=body)).status_code == 200
    pid = (await server.models())["tiny"]["pid"]
    lines = (await _command(server.log.parent, "ps", "--port", port)).stdout.splitlines()
    assert len(lines) == 2
    for part in ("tiny", "ready", str(pid), "GB", "ago", "in 10m"):
        assert part in lines[1]


async def test_ps_shows_the_key_it_is_given(keyed: Server) -> None:
    home, port = keyed.log.parent, keyed.url.rpartition(":")[2]
    refused = await _command(home, "ps", "--port", port)
    assert refused.returncode == 1
    assert "No API key was given" in refused.stderr
    user = await _command(home, "ps", "--port", port, "--api-key", "user")
    assert "not one for administrators" in user.stderr
    boss = await _command(home, "ps", "--port", port, "--api-key", "boss")
    assert boss.returncode == 0


# pull: from here on failed models are left behind


async def test_a_pulled_model_answers_at_once(
    hub: Hub, repo: str, server: Server, client: httpx.AsyncClient
) -> None:
    size = sum(len(content) for content in hub.repos[repo].values())
    hub.pace = 0.02
    *progress, last = await pulled(client, repo)
    assert last == {"status": "success"}
    assert progress[-1]["completed"] == progress[-1]["total"] == size
    done = [one["completed"] for one in progress]
    assert done == sorted(done)
    assert len(set(done)) > 2
    answer = await client.post(CHAT, json=chat(repo, max_tokens=2))
    assert answer.status_code == 200, answer.text
    assert (await server.models())[repo]["download"] is None
    assert hub.endpoint not in server.log.read_text(), "an address may be signed"


async def test_two_pulls_at_once_share_one_download(
    hub: Hub, repo: str, client: httpx.AsyncClient
) -> None:
    hub.pace = 0.02
    both = await asyncio.gather(pulled(client, repo), pulled(client, repo))
    assert [events[-1] for events in both] == [{"status": "success"}] * 2
    assert len(hub.downloads(WEIGHTS)) == 1


async def test_a_half_download_is_shown_as_such_and_never_served(
    hub: Hub, repo: str, server: Server, client: httpx.AsyncClient
) -> None:
    async with half_pulled(server, hub, repo):
        shown = (await server.models())[repo]
        assert shown["state"] == "downloading"
        assert shown["download"]["total"] > 0
        assert repo not in await listed(client)
        assert_refused(await client.post(CHAT, json=chat(repo)), 404)
        assert_refused(await client.post(f"/admin/models/{repo}/load"), 404)
        hub.release()


async def test_a_stopping_server_waits_for_no_pull_and_one_killed_at_half_is_resumed_and_whole(
    hub: Hub, repo: str, tmp_path: Path
) -> None:
    content = hub.repos[repo][WEIGHTS]
    with pulling_from(hub), serving(tmp_path) as server:
        async with half_pulled(server, hub, repo):
            server.process.kill()
            server.process.wait()
    hub.release()
    here = _partial_bytes(server)
    assert 0 < here < len(content)
    with pulling_from(hub), serving(tmp_path) as server:
        async with server.client() as client:
            assert await listed(client) == []
            assert (await pulled(client, repo))[-1] == {"status": "success"}
            path = Path((await server.models())[repo]["path"])
            assert hub.downloads(WEIGHTS)[-1] == f"bytes={here}-"
            assert hub.sent[-1] == len(content) - here
            assert (path / WEIGHTS).read_bytes() == content
            await _stops_amid_a_pull(server, client, hub, repo)


async def _stops_amid_a_pull(
    server: Server, client: httpx.AsyncClient, hub: Hub, repo: str
) -> None:
    hub.repos["tiny/another"] = hub.repos[repo]
    hub.mend()
    hub.pace = 0.1
    pulling = asyncio.create_task(pulled(client, "tiny/another"))

    async def begun() -> bool:
        return any(hub.sent)

    await until(begun, 20)
    server.process.terminate()
    last = (await pulling)[-1]
    assert last["error"]["code"] == "server_stopping"

    async def ended() -> bool:
        return server.process.poll() is not None

    await until(ended, 5)
    assert server.process.returncode == 0


async def test_a_pull_that_fails_tells_why_and_is_shown_as_failed(
    hub: Hub, repo: str, server: Server, client: httpx.AsyncClient
) -> None:
    hub.gated.add(repo)
    last = (await pulled(client, repo))[-1]
    assert "HF_TOKEN" in last["error"]["message"]
    shown = (await server.models())[repo]
    assert shown["state"] == "failed"
    assert "HF_TOKEN" in shown["reason"]


async def test_a_model_larger_than_the_disk_is_refused_before_it_is_fetched(
    hub: Hub, repo: str, client: httpx.AsyncClient
) -> None:
    hub.claimed_size = 10**15
    last = (await pulled(client, repo))[-1]
    assert last["error"]["code"] == "insufficient_storage"
    assert hub.downloads(WEIGHTS) == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"model": ""}, 400),
        ({"model": 3}, 400),
        ({"model": "/etc/passwd"}, 404),
        ({"model": "../../etc"}, 404),
        ({"model": "http://127.0.0.1/a/b"}, 400),
    ],
)
async def test_what_is_no_model_name_is_not_pulled(
    client: httpx.AsyncClient, body: dict[str, Any], status: int
) -> None:
    assert_refused(await client.post(PULL, json=body), status)


# remove


async def test_a_model_is_removed_only_when_it_is_not_loaded(
    model: Path, server: Server, client: httpx.AsyncClient
) -> None:
    home = server.log.parent
    folder = shutil.copytree(model, home / "models" / "org" / "mine")
    await client.post("/admin/models/org/mine/load")
    error = assert_refused(await client.delete("/admin/models/org/mine"))
    assert "unload it first" in error["message"]
    done = await _command(home, "rm", "org/mine", "--yes")
    assert done.returncode == 1
    assert "unload it first" in done.stderr
    assert folder.exists()
    await client.post("/admin/models/org/mine/unload")
    answer = await client.delete("/admin/models/org/mine")
    assert (answer.status_code, answer.json()["deleted"]) == (200, True)
    assert not folder.exists()
    assert "org/mine" not in await listed(client)
    assert "org/mine" not in await server.models()


async def test_a_model_that_the_operator_keeps_elsewhere_is_not_removed(
    server: Server, client: httpx.AsyncClient
) -> None:
    error = assert_refused(await client.delete("/admin/models/theirs"))
    assert "Remove its folder yourself" in error["message"]
    assert "theirs" in await server.models()


async def _command(home: Path, *arguments: str) -> Done:
    """Run the command line on the server's own files."""
    own = {"MLX_SERVER_HOME": str(home), "HF_HUB_CACHE": str(home / "hub" / "hub")}
    own |= {"COLUMNS": "200"}
    return await asyncio.to_thread(run, os.environ | own, *arguments)
