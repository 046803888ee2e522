"""An engine whose other ranks are on other machines, for which workers on this one stand."""

import socket
from pathlib import Path

import pytest

from mlx_server.engine.protocol import Device, Load, LoadOptions
from mlx_server.models.hosts.files import ModelFiles
from mlx_server.models.hosts.hub import Hub
from mlx_server.models.hosts.part import Part
from mlx_server.models.hosts.versions import own_versions
from tests.engine.conftest import rows_of, started
from tests.engine.test_ranks import THREE, assert_same, mixed
from tests.support.architectures import VOCAB_SIZE, build_architecture
from tests.support.engines import DirectEngine
from tests.support.hosts import SECRET, working

NEED = 1 << 28


@pytest.mark.soak
async def test_three_machines_say_what_one_says(tmp_path: Path) -> None:
    folder = build_architecture(tmp_path / "llama", "llama", **THREE)
    asked = mixed(6, VOCAB_SIZE, most=24)
    async with started(folder) as alone:
        expected = await rows_of(alone, *asked)
    names = ("second", "third")
    hub = Hub(names, SECRET.encode(), own_versions(), patience=20)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    hub.start(listener, Device("cpu", 1 << 34, 1 << 34))
    options = LoadOptions(ranks=3)
    with working(tmp_path / "2", port, "second"), working(tmp_path / "3", port, "third"):
        digests = ModelFiles(tmp_path).digests(folder)
        load = Load(str(folder), options)
        ranks = await hub.take(Part(names, 2, "llama", digests, NEED, load))
        client = await DirectEngine.start("llama", folder, options, elsewhere=ranks)
        try:
            assert_same(await rows_of(client, *asked), expected)
            assert client.stats is not None
            found = [(rank.rank, rank.host) for rank in client.stats.ranks]
            assert found == [(0, ""), (1, "second"), (2, "third")]
        finally:
            await client.stop()
            await hub.stop()
