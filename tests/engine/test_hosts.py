"""An engine whose other ranks are on other machines, for which workers on this one stand."""

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlx_server.dimensions import Way
from mlx_server.engine.protocol import Device, Load, LoadOptions
from mlx_server.errors import LoadCrashed, ModelLoadFailed
from mlx_server.models.hosts import distant
from mlx_server.models.hosts.files import ModelFiles
from mlx_server.models.hosts.hub import Hub
from mlx_server.models.hosts.part import Part
from mlx_server.models.hosts.versions import own_versions
from tests.engine.conftest import rows_of, started
from tests.engine.test_ranks import THREE, assert_same, mixed
from tests.support.architectures import VOCAB_SIZE, build_architecture
from tests.support.engines import DirectEngine
from tests.support.hosts import SECRET, working
from tests.support.server import logged

NEED = 1 << 28


@contextlib.asynccontextmanager
async def listening(*names: str) -> AsyncIterator[tuple[Hub, int]]:
    hub = Hub(names, SECRET.encode(), own_versions(), patience=20)
    listener = socket.create_server(("127.0.0.1", 0))
    hub.start(listener, Device("cpu", 1 << 34, 1 << 34))
    try:
        yield hub, listener.getsockname()[1]
    finally:
        await hub.stop()


async def test_why_an_engine_elsewhere_cannot_load_is_told_with_its_machine(tmp_path: Path) -> None:
    """The last that it says comes through."""
    folder = build_architecture(tmp_path / "llama", "llama", **THREE)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    digests = ModelFiles(tmp_path).digests(folder)
    part = Part(("second",), 1, "llama", digests, NEED, Load(str(folder), LoadOptions()))
    async with listening("second") as (hub, port):
        with working(tmp_path / "2", port) as worker:
            with pytest.raises(ModelLoadFailed, match=r"^host `second`: ") as caught:
                await distant.join("llama", await hub.take(part))
            assert not isinstance(caught.value, LoadCrashed)
            assert logged(worker.said(), "engine_started")
            assert not worker.ranks()


@pytest.mark.soak
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
async def test_three_machines_say_what_one_says(tmp_path: Path, way: Way) -> None:
    folder = build_architecture(tmp_path / "qwen2", "qwen2", **THREE)
    asked = mixed(6, VOCAB_SIZE, most=24)
    async with started(folder) as alone:
        expected = await rows_of(alone, *asked)
        assert alone.ready is not None
        size = alone.ready.weights_bytes
    names = ("second", "third")
    digests = ModelFiles(tmp_path).digests(folder)
    options = LoadOptions(ranks=3, division=way)
    part = Part(names, 2, "qwen2", digests, NEED, Load(str(folder), options))
    async with listening(*names) as (hub, port):
        with working(tmp_path / "2", port, "second"), working(tmp_path / "3", port, "third"):
            ranks = await hub.take(part)
            client = await DirectEngine.start("qwen2", folder, options, elsewhere=ranks)
            try:
                assert_same(await rows_of(client, *asked), expected)
                assert client.stats is not None
                found = [(rank.rank, rank.host) for rank in client.stats.ranks]
                assert found == [(0, ""), (1, "second"), (2, "third")]
                # By heads each has a third, by layers rank 0 two of four.
                assert client.ready is not None
                ends = 2 * VOCAB_SIZE * 96 * 4
                share = {"tensor": 1 / 3, "pipeline": 2 / 4}[way]
                held = ends + share * (size - ends)
                assert client.ready.weights_bytes == pytest.approx(held, rel=0.02)
            finally:
                await client.stop()
