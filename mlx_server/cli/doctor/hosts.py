"""Checks of the machines that a model is to be divided among."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_server.cli.doctor.finding import Finding, fail, ok, warn
from mlx_server.cli.options import gigabytes
from mlx_server.errors import ServerError

if TYPE_CHECKING:
    from mlx_server.config import Settings
    from mlx_server.models.hosts.hostfile import HostFile
    from mlx_server.models.hosts.link import Link
    from mlx_server.models.hosts.preflight import Preflight

PATIENCE = 20.0
"""Seconds for a machine to come."""
LAYERS, WIDTH = 32, 4096
"""Of a model of some 8 billion weights."""
SUMS, NUMBER_BYTES = 2, 2
"""In each layer, and of each number."""
RDMA_SUM = 31e-6
"""Seconds of a sum over two Macs by RDMA over Thunderbolt, from what others have published."""
MANY_MS = 20.0
FIX = "see docs/distributed.md; `ssh {name} mlx-server doctor` tells more"


def hosts(settings: "Settings", file: Path, models: Sequence[str]) -> list[Finding]:
    """Raises ServerError for a file that cannot be used."""

    async def found() -> list[Finding]:
        return [finding async for finding in _findings(settings, file, models)]

    return asyncio.run(found())


async def _findings(
    settings: "Settings", file: Path, models: Sequence[str]
) -> AsyncIterator[Finding]:
    from mlx_server.models.hosts.hostfile import HostFile
    from mlx_server.models.hosts.machines import Machines
    from mlx_server.models.hosts.preflight import Preflight
    from mlx_server.models.pool.device import find_device

    alone = {"hosts_file": file, "workers": [], "workers_by_model": {}, "worker_port": 0}
    settings = settings.model_copy(update=alone | {"host_wait": PATIENCE})
    listed = HostFile.read(file)
    machines = Machines(settings)
    await machines.start(await find_device())
    try:
        preflight = Preflight(settings, listed, machines)
        await preflight.gather()
        for name, host in preflight.hosts.items():
            detail = f"{name}: the same versions, {gigabytes(host.budget)} for models"
            yield ok("host", detail)
        for name, why in preflight.away.items():
            yield fail("host", why, FIX.format(name=name))
        for model in models:
            async for finding in _files(settings, preflight, model):
                yield finding
        async for finding in _links(preflight, listed):
            yield finding
    finally:
        await machines.stop()


async def _files(
    settings: "Settings", preflight: "Preflight", model: str
) -> AsyncIterator[Finding]:
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.sources import ModelSources

    try:
        entry = Catalog(ModelSources.of(settings)).add(model)
    except ServerError as error:
        yield fail("files", str(error), "name a model that this machine has")
        return
    assert entry.path is not None
    for name, host in preflight.hosts.items():
        try:
            fault = await preflight.difference(host, entry.id, entry.path)
        except ServerError as error:
            fault = str(error)
        if fault is None:
            yield ok("files", f"{name}: {entry.id} is the same")
        else:
            fix = f"copy the folder there, or `mlx-server pull {entry.id}` on both"
            yield fail("files", f"{name}: {entry.id}: {fault}", fix)


async def _links(preflight: "Preflight", listed: "HostFile") -> AsyncIterator[Finding]:
    rdma = listed.over_rdma
    try:
        async for one, other, link in preflight.links():
            yield link_finding(one, other, link, len(listed.machines), rdma)
    except ServerError as error:
        yield fail("link", str(error), "let the machines connect to each other at any port")


def link_finding(one: str, other: str, link: "Link", machines: int, rdma: bool = False) -> Finding:
    """What the link is, and what to expect of a ring of such links."""
    of_sum = RDMA_SUM if rdma else seconds_of_sum(link, WIDTH * NUMBER_BYTES, machines)
    wait = 1000 * LAYERS * SUMS * of_sum
    layers = 1000 * seconds_of_states(link, WIDTH * NUMBER_BYTES, machines)
    by_rdma = ", by RDMA, which is not measured here" if rdma else ""
    detail = (
        f"{one} to {other}: {1e6 * link.round_trip:,.0f} µs there and back, "
        f"{link.rate / 1e9:.2f} GB/s; a model of {LAYERS} layers of {WIDTH:,} would wait "
        f"{wait:.1f} ms for each token divided by heads{by_rdma}, {layers:.1f} ms by layers"
    )
    if wait > MANY_MS:
        advice = "use a cable: Thunderbolt, or Ethernet of 10 gigabits; or `division = pipeline`"
        return warn("link", detail, advice)
    return ok("link", detail)


def seconds_of_states(link: "Link", size: int, machines: int) -> float:
    """Of a state of `size` bytes that goes from each machine to the next, and of the token drawn,
    which all get as a sum.
    """
    state = link.round_trip / 2 + size / link.rate
    return (machines - 1) * state + seconds_of_sum(link, 4, machines)


def seconds_of_sum(link: "Link", size: int, machines: int) -> float:
    """Of `size` bytes in a ring, which takes 2 (n - 1) steps of an n-th each way."""
    steps = 2 * (machines - 1)
    return steps * (link.round_trip / 2 + size / machines / link.rate)
