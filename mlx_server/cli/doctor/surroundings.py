"""Checks of folders, models, the port and the hub."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_server.cli.doctor.finding import Finding, fail, ok, warn
from mlx_server.cli.options import CommandError, gigabytes
from mlx_server.cli.remote import url_of
from mlx_server.cli.sockets import advice_on, bind, find_addresses
from mlx_server.errors import reason

if TYPE_CHECKING:
    from mlx_server.config import Settings

LOW_DISK = 10_000_000_000
HUB_SECONDS = 5.0
PORT_SECONDS = 2.0


def disk(settings: "Settings") -> Finding:
    """Of the home: whether it can be written, and how much fits."""
    home = settings.home
    place = next(parent for parent in (home, *home.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    detail = f"{home}, {gigabytes(free)} free"
    if not os.access(place, os.W_OK):
        fix = f"let this user write {place}, or set MLX_SERVER_HOME to a folder of theirs"
        return fail("disk", f"{home} cannot be written", fix)
    if free < LOW_DISK:
        fix = "`mlx-server list` shows sizes and `mlx-server rm` makes room; lower `disk_cache`"
        return warn("disk", detail, fix)
    return ok("disk", detail)


def models(settings: "Settings") -> list[Finding]:
    """Whether what looks like a model can be served, and its weights are whole."""
    from mlx_server.models.store.catalog import Catalog
    from mlx_server.models.store.demo import DEMO
    from mlx_server.models.store.sources import ModelSources

    catalog = Catalog(ModelSources.of(settings))
    entries = catalog.entries()
    size = sum(entry.size for entry in entries)
    findings = [ok("models", f"{len(entries)} that can be served, {gigabytes(size)}")]
    if not entries:
        fix = f"`mlx-server pull {DEMO}`, or `mlx-server pull ORG/NAME`"
        findings = [warn("models", "there are none yet", fix)]
    for name, why in catalog.faults().items():
        fix = f"`mlx-server pull {name}` again, or `mlx-server rm {name}`"
        findings.append(warn("models", f"{name} cannot be served: {why}", fix))
    for entry in entries:
        for file in sorted(entry.path.glob("*.safetensors")) if entry.path else ():
            if fault := cut_off(file):
                fix = f"`mlx-server rm {entry.id}`, then pull it again"
                findings.append(fail("models", f"{entry.id}: {file.name} {fault}", fix))
    return findings


def cut_off(file: Path) -> str | None:
    """What is wrong with a safetensors file's length, by its header; None if nothing is.

    The format: 8 bytes of header length, a JSON header with each tensor's offsets, the data.
    """
    import json

    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if not 2 <= length <= size - 8:
                return "has no header"
            header = json.loads(stream.read(length))
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__})"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"has {size:,} bytes instead of {whole:,}"


def port(settings: "Settings") -> Finding:
    """Free, or held by a server of ours."""
    url = url_of(settings.host, settings.port)
    try:
        for one in bind(settings.host, settings.port, find_addresses(settings.host, settings.port)):
            one.close()
    except CommandError as error:
        if _is_ours(url):
            return ok("port", f"an mlx-server answers at {url}")
        return fail("port", str(error), advice_on(settings.port))
    return ok("port", f"{settings.host} port {settings.port} is free")


def _is_ours(url: str) -> bool:
    import httpx2

    try:
        with httpx2.Client(timeout=PORT_SECONDS, trust_env=False) as client:
            return bool(client.get(f"{url}/health").json() == {"status": "ok"})
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
        return False


def hub() -> Finding:
    """Whether models can be pulled now."""
    import httpx2
    from huggingface_hub import constants

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return warn("hub", "HF_HUB_OFFLINE is set", "unset it to pull models")
    try:
        with httpx2.Client(timeout=HUB_SECONDS, follow_redirects=True) as client:
            status = client.head(f"{endpoint}/api/models?limit=1").status_code
    except httpx2.HTTPError as error:
        fix = "check the network and HTTPS_PROXY; models that are here can be served without"
        return warn("hub", f"{endpoint} cannot be reached: {reason(error)}", fix)
    if status >= 500:
        return warn("hub", f"{endpoint} answers {status}", "try again later")
    token = "with a token" if os.environ.get("HF_TOKEN") else "without a token"
    return ok("hub", f"{endpoint} answers, {token}")
