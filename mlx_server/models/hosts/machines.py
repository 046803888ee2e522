"""The other machines that take ranks of models, as the settings say."""

import asyncio
import logging
import os
import secrets
import socket
import stat
import sys
from collections.abc import Sequence

from mlx_server.config import Settings
from mlx_server.engine.protocol import Device, Load
from mlx_server.errors import ModelLoadFailed, Unavailable, reason
from mlx_server.events import event
from mlx_server.models.hosts.elsewhere import RanksElsewhere
from mlx_server.models.hosts.files import ModelFiles
from mlx_server.models.hosts.host import Host
from mlx_server.models.hosts.hostfile import HostFile
from mlx_server.models.hosts.hub import Hub
from mlx_server.models.hosts.opening import MIN_SECRET
from mlx_server.models.hosts.part import Part
from mlx_server.models.hosts.ssh import Place, SshWorkers
from mlx_server.models.hosts.versions import own_versions

ANY = "0.0.0.0"

log = logging.getLogger("mlx_server.hosts")


def secret_of(settings: Settings) -> str | None:
    """What servers and their workers know. Raises Unavailable."""
    if settings.worker_secret is not None:
        return _long_enough(settings.worker_secret.get_secret_value().strip(), "worker_secret")
    file = settings.worker_secret_file
    if file is None:
        return None
    try:
        content = file.read_text().strip()
        if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning(event("secret_exposed", file=file, advice="chmod 600"))
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"setting worker_secret_file: {reason(error)}") from error
    return _long_enough(content, "worker_secret_file")


def _long_enough(secret: str, setting: str) -> str:
    if len(secret.encode()) < MIN_SECRET:
        raise Unavailable(
            f"setting {setting}: a secret has at least {MIN_SECRET} characters; "
            "`openssl rand -hex 32` makes one"
        )
    return secret


class Machines:
    """Raises Unavailable for a file or a secret that cannot be used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._file = HostFile.read(settings.hosts_file) if settings.hosts_file else None
        self._files = ModelFiles(settings.home)
        self._secret = ""
        self._ssh: asyncio.Task[None] | None = None
        self._hub: Hub | None = None
        if names := self._names():
            self._secret = self._chosen_secret()
            secret, wait = self._secret.encode(), settings.host_wait
            more = (self._file.here.ips, self._file.fabric) if self._file else ()
            self._hub = Hub(names, secret, own_versions(), wait, *more)

    def of_model(self, model_id: str) -> tuple[str, ...]:
        """Names of those that it may have, those that it takes first."""
        listed = [machine.ssh for machine in self._file.others] if self._file else []
        usual = self._settings.workers or listed
        return tuple(self._settings.workers_by_model.get(model_id, usual))

    async def start(self, device: Device) -> None:
        """`device` is this machine's. Raises Unavailable for an address in use."""
        if self._hub is None:
            return
        listener = self._listener()
        host, port = listener.getsockname()
        log.info(event("workers_may_join", host=host, port=port))
        self._hub.start(listener, device)
        if self._file is not None:
            settings = self._settings
            place = Place(
                python=settings.hosts_python or sys.executable,
                folder=settings.hosts_folder or os.getcwd(),
                told=settings.hosts_folder is not None,
                server=f"{host}:{port}",
            )
            ssh = SshWorkers(self._file, place, self._secret, self._hub.troubles)
            self._ssh = asyncio.create_task(ssh.run(), name="ssh")

    async def stop(self) -> None:
        if self._hub is not None:
            await self._hub.stop()
        if self._ssh is not None:
            self._ssh.cancel()
            await asyncio.wait([self._ssh])

    async def host(self, name: str) -> Host:
        """Waits for it as a load would. Raises ModelLoadFailed."""
        assert self._hub is not None
        return await self._hub.present(name)

    async def take(
        self, names: Sequence[str], count: int, model: str, need: int, load: Load
    ) -> RanksElsewhere:
        """Have `count` of `names`, rather the first, take a part of the model each, of `need`
        bytes: a rank of what `load` says, or all of it. Raises HostAway, HostRefuses, and
        ModelLoadFailed for files that cannot be read here.
        """
        assert self._hub is not None
        try:
            digests = await asyncio.to_thread(self._files.of_load, load)
        except OSError as error:
            raise ModelLoadFailed(f"its files cannot be read: {reason(error)}") from error
        return await self._hub.take(Part(tuple(names), count, model, digests, need, load))

    async def news(self) -> None:
        """Until a machine comes, or has let go of a part of a model."""
        assert self._hub is not None
        await self._hub.news()

    def _names(self) -> set[str]:
        listed = [machine.ssh for machine in self._file.others] if self._file else []
        single = [name for names in self._settings.workers_by_model.values() for name in names]
        return {*self._settings.workers, *listed, *single}

    def _chosen_secret(self) -> str:
        secret = secret_of(self._settings)
        if secret is None and self._file is not None:
            secret = secrets.token_hex()
        if secret is None:
            raise Unavailable(
                "workers must show a secret: set MLX_SERVER_WORKER_SECRET or worker_secret_file, "
                "here and there"
            )
        return secret

    def _listener(self) -> socket.socket:
        settings = self._settings
        host = settings.worker_host or (self._file.here.ips[0] if self._file else ANY)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, settings.worker_port))
            listener.listen()
        except OSError as error:
            listener.close()
            advice = "; is this the first of the file's hosts?" if self._file else ""
            raise Unavailable(
                f"cannot listen for workers on {host} port {settings.worker_port}: "
                f"{reason(error)}{advice}"
            ) from error
        return listener
