"""An engine whose other ranks are on other machines, for which workers on this one stand."""

import socket
from pathlib import Path

import pytest

from mlx_server.dimensions import Way
from mlx_server.engine.protocol import Device, Load, LoadOptions
from mlx_server.models.hosts.files import ModelFiles
from mlx_server.models.hosts.hub import Hub
from mlx_server.models.hosts.versions import own_versions
from tests.engine.conftest import rows_of, started
from tests.engine.test_ranks import THREE, assert_same, mixed
from tests.support.architectures import VOCAB_SIZE, build_architecture
from tests.support.engines import DirectEngine
from tests.support.hosts import SECRET, working

NEED = 1 << 28


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
    hub = Hub(names, SECRET.encode(), own_versions(), patience=20)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    hub.start(listener, Device("cpu", 1 << 34, 1 << 34))
    options = LoadOptions(ranks=3, division=way)
    with working(tmp_path / "2", port, "second"), working(tmp_path / "3", port, "third"):
        digests = ModelFiles(tmp_path).digests(folder)
        ranks = await hub.take(names, "qwen2", digests, NEED, Load(str(folder), options))
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
            part = ends + share * (size - ends)
            assert client.ready.weights_bytes == pytest.approx(part, rel=0.02)
        finally:
            await client.stop()
            await hub.stop()
