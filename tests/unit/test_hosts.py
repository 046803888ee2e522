"""Machines that take ranks: who may join, what is refused, what is lost. No rank runs here."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_server.config import Settings
from mlx_server.engine.protocol import HEADER, Device, FrameReader, Load, LoadOptions, frame
from mlx_server.errors import ModelLoadFailed, Unavailable
from mlx_server.models.hosts import connection, hub, opening, worker
from mlx_server.models.hosts.connection import Connection, ConnectionLost
from mlx_server.models.hosts.files import ModelFiles, difference
from mlx_server.models.hosts.hub import Hub
from mlx_server.models.hosts.machines import Machines, secret_of
from mlx_server.models.hosts.messages import (
    NONCE_BYTES,
    Answer,
    Digests,
    Dismissed,
    Ended,
    Join,
    Take,
    Ticket,
    decode_challenge,
    decode_from_server,
    decode_verdict,
)
from mlx_server.models.hosts.opening import NotTrusted, connect
from mlx_server.models.hosts.part import Part
from mlx_server.models.hosts.versions import own_versions
from mlx_server.models.hosts.worker import Server, Worker
from tests.support.tiny import build_tiny_model

SECRET = b"sixteen bytes at least"
DEVICE = Device("cpu", 1 << 34, 1 << 34)
NEED = 1 << 20
TWO = LoadOptions(ranks=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@contextlib.asynccontextmanager
async def listening(
    *names: str, patience: float = 5.0, **more: Any
) -> AsyncIterator[tuple[Hub, int]]:
    made = Hub(names or ("second",), SECRET, own_versions(), patience, **more)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    made.start(listener, DEVICE)
    try:
        yield made, port
    finally:
        await made.stop()


def joining(name: str = "second", **more: Any) -> Join:
    facts = {"versions": own_versions(), "device": DEVICE, "budget": 1 << 30, "addresses": []}
    return Join(name=name, **(facts | more))


async def joined(port: int, join: Join | None = None) -> Connection:
    """A worker that is nothing but its connection."""
    made = await connect("127.0.0.1", port, SECRET)
    await made.send(join or joining())
    return made


async def told(made: Connection, kind: type[Any]) -> Any:
    """The next message of that kind."""
    async with asyncio.timeout(5):
        while True:
            message = decode_from_server(await made.receive())
            if isinstance(message, kind):
                return message


async def until(check: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def load_of(folder: Path, ranks: int = 2) -> Load:
    return Load(str(folder), LoadOptions(ranks=ranks))


def part(load: Load, *names: str, count: int = 1, digests: Digests | None = None) -> Part:
    return Part(names, count, "tiny", digests or {}, NEED, load)


# who may join


async def test_both_sides_must_know_the_secret() -> None:
    async with listening() as (_, port):
        with pytest.raises(NotTrusted, match="the secret is not the same"):
            await connect("127.0.0.1", port, b"another of sixteen")
        made = await connect("127.0.0.1", port, SECRET)
        made.close()


async def test_a_server_that_does_not_know_the_secret_is_not_trusted() -> None:
    """It may say that it accepts, or send the worker's own proof back."""

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(opening.Challenge(opening.VERSION, os.urandom(NONCE_BYTES))))
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        answer = msgspec.msgpack.decode(await reader.readexactly(length), type=Answer)
        writer.write(frame(opening.Accepted(answer.proof)))

    async with await asyncio.start_server(pretend, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(NotTrusted, match="the secret is not the same"):
            await connect("127.0.0.1", port, SECRET)


async def test_an_opening_that_was_overheard_opens_nothing() -> None:
    async with listening() as (_, port):
        first = await raw(port)
        nonce = decode_challenge(await first.receive()).nonce
        answer = Answer(os.urandom(NONCE_BYTES), b"")
        proof = opening._proof(SECRET, "worker", nonce, answer.nonce)
        overheard = Answer(answer.nonce, proof)
        await first.send(overheard)
        assert isinstance(decode_verdict(await first.receive()), opening.Accepted)
        second = await raw(port)
        await second.receive()
        await second.send(overheard)
        assert isinstance(decode_verdict(await second.receive()), opening.Denied)
        first.close()
        second.close()


async def raw(port: int) -> Connection:
    sock = socket.create_connection(("127.0.0.1", port))
    return Connection(sock)


@pytest.mark.parametrize(
    "said",
    [
        HEADER.pack(1 << 31) + b"x",
        HEADER.pack(5000) + bytes(5000),
        HEADER.pack(4) + b"\xff" * 4,
        b"GET / HTTP/1.1\r\n\r\n",
        frame(Ticket("t")),
        frame(Answer(b"", b"")),
    ],
)
async def test_who_speaks_otherwise_is_cut_off(said: bytes) -> None:
    async with listening() as (made, port):
        stranger = await raw(port)
        await stranger.receive()
        with contextlib.suppress(ConnectionLost):
            await asyncio.get_running_loop().sock_sendall(stranger._socket, said)
            while True:
                verdict = await stranger.receive()
                assert isinstance(decode_verdict(verdict), opening.Denied)
        stranger.close()
        assert made.names() == []


async def test_strangers_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MOST_OPENINGS", 2)
    monkeypatch.setattr(hub, "OPENING_SECONDS", 0.3)
    async with listening() as (made, port):
        silent = [await raw(port) for _ in range(2)]
        for one in silent:
            await one.receive()
        further = await raw(port)
        with pytest.raises(ConnectionLost):
            await further.receive()
        for one in silent:  # nothing was said, and time is up
            with pytest.raises(ConnectionLost):
                await one.receive()
        after = await joined(port)
        await until(lambda: made.names() == ["second"])
        for one in (*silent, further, after):
            one.close()


@pytest.mark.parametrize(
    ("join", "why"),
    [
        (joining("stranger"), "no use for a worker called `stranger`"),
        (joining(versions=own_versions() | {"mlx": "0.1"}), "it has mlx 0.1 and the server "),
        (joining(versions={}), "it has mlx-server missing and the server "),
        (joining(device=Device("cuda", 1, 1)), "its device is cuda and the server's cpu"),
    ],
)
async def test_who_cannot_be_used_is_told_why(join: Join, why: str, model: Path) -> None:
    async with listening() as (made, port):
        one = await joined(port, join)
        assert why in (await told(one, Dismissed)).reason
        assert made.names() == []
        one.close()
        if join.name == "second":
            with pytest.raises(ModelLoadFailed, match=f"host `second`: {why}"):
                await made.take(part(load_of(model), "second"))


async def test_the_last_to_join_by_a_name_has_it() -> None:
    async with listening() as (made, port):
        first = await joined(port)
        await until(made.names)
        second = await joined(port)
        assert "another worker has joined" in (await told(first, Dismissed)).reason
        await asyncio.sleep(0.05)
        assert made.names() == ["second"]
        first.close()
        second.close()


def test_a_frame_that_nobody_of_ours_would_send_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError, match="a frame of 4026531840 bytes"):
        list(FrameReader().feed(HEADER.pack(0xF0000000)))


# ranks


async def test_a_rank_gets_the_connection_that_brings_its_ticket(model: Path) -> None:
    async with listening() as (made, port):
        one = await joined(port)
        taking = asyncio.create_task(made.take(part(load_of(model), "second")))
        take: Take = await told(one, Take)
        assert [host.name for host in take.load.hosts] == ["", "second"]
        assert [host.addresses for host in take.load.hosts] == [["127.0.0.1"]] * 2
        wrong, right = await raw_ticket(port, "another"), await raw_ticket(port, take.ticket)
        ranks = await taking
        with pytest.raises(ConnectionLost):
            await wrong.receive()
        again = await raw_ticket(port, take.ticket)  # it serves once
        with pytest.raises(ConnectionLost):
            await again.receive()
        ranks.sockets[0].sendall(b"\0\0\0\1x")
        assert await right.receive() == b"x"
        await one.send(Ended(take.ticket, -9))
        await ranks.heard()
        assert ranks.killed
        assert ranks.lost_host is None
        ranks.close_sockets()
        for each in (one, wrong, right, again):
            each.close()


async def raw_ticket(port: int, ticket: str) -> Connection:
    made = await connect("127.0.0.1", port, SECRET)
    await made.send(Ticket(ticket))
    return made


async def test_a_machine_that_goes_is_named(model: Path) -> None:
    async with listening("second", "third") as (made, port):
        both = [await joined(port, joining(name)) for name in ("second", "third")]
        wanted = part(load_of(model, 3), "second", "third", count=2)
        taking = asyncio.create_task(made.take(wanted))
        takes = [await told(one, Take) for one in both]
        brought = [await raw_ticket(port, take.ticket) for take in takes]
        ranks = await taking
        both[1].close()
        await asyncio.wait_for(ranks.until_lost(), 2)
        await ranks.heard()
        assert ranks.lost_host == "third"
        ranks.release()
        for each in (both[0], *brought):
            each.close()


async def test_a_silent_machine_is_gone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.3)
    async with listening(patience=0.5) as (made, port):
        one = await joined(port)
        await until(made.names)
        await until(lambda: not made.names(), 2)
        with pytest.raises(ModelLoadFailed, match="host `second` is away: no worker of it has jo"):
            await made.take(part(load_of(model), "second"))
        one.close()


async def test_one_that_comes_back_in_time_is_waited_for(model: Path) -> None:
    async with listening() as (made, port):
        taking = asyncio.create_task(made.take(part(load_of(model), "second")))
        first = await joined(port)
        await told(first, Take)
        first.close()
        second = await joined(port)
        take = await told(second, Take)
        bringing = await raw_ticket(port, take.ticket)
        (await taking).release()
        for each in (second, bringing):
            each.close()


async def test_as_many_addresses_as_here(model: Path) -> None:
    async with listening(own_addresses=["10.0.0.1", "10.0.1.1"]) as (made, port):
        one = await joined(port)
        with pytest.raises(ModelLoadFailed, match=r"`second`: it has 1 addresses .* machine 2"):
            await made.take(part(load_of(model), "second"))
        one.close()


# what a worker refuses


@contextlib.asynccontextmanager
async def a_worker(port: int, **settings: Any) -> AsyncIterator[Worker]:
    server = Server("127.0.0.1", port, SECRET)
    made = Worker(Settings(**settings), server, "second", [], DEVICE)
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])


Refusing = Callable[..., Awaitable[str]]


@pytest.fixture
def refused(model: Path, tmp_path: Path) -> Refusing:
    """What a real worker says that is asked for a rank."""

    async def ask(options: LoadOptions = TWO, **settings: Any) -> str:
        settings = {"home": tmp_path / "theirs", "model_dirs": [model.parent]} | settings
        digests = ModelFiles(tmp_path / "ours").digests(model)
        async with listening() as (made, port), a_worker(port, **settings):
            with pytest.raises(ModelLoadFailed) as caught:
                await made.take(part(Load("/nowhere", options), "second", digests=digests))
            return str(caught.value)

    return ask


async def test_a_model_that_is_not_there(refused: Refusing) -> None:
    assert await refused(model_dirs=[]) == "host `second`: the model is not there"


async def test_other_files_of_the_model(refused: Refusing, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "others" / "tiny")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    line = "host `second`: its files of the model are others: its model.safetensors differs"
    assert await refused(model_dirs=[other.parent]) == line


async def test_too_little_memory(refused: Refusing) -> None:
    line = "host `second`: its part of the model needs 1,048,576 bytes of memory"
    line += " and models may take 1,024 there"
    assert await refused(memory_limit="1024") == line


async def test_an_address_of_another_machine(model: Path, tmp_path: Path) -> None:
    async with listening(own_addresses=["127.0.0.1"]) as (made, port):
        server = Server("127.0.0.1", port, SECRET)
        settings = Settings(home=tmp_path, model_dirs=[model.parent])
        running = asyncio.create_task(
            Worker(settings, server, "second", ["192.0.2.1"], DEVICE).run()
        )
        with pytest.raises(ModelLoadFailed, match=r"`second`: 192\.0\.2\.1 is no address of"):
            await made.take(part(load_of(model), "second"))
        running.cancel()
        await asyncio.wait([running])


async def test_code_of_a_model_that_the_machine_does_not_trust(refused: Refusing) -> None:
    line = await refused(LoadOptions(ranks=2, trust_remote_code=True))
    assert "code may not run there" in line


async def test_a_format_that_the_processor_has_no_use_for(refused: Refusing) -> None:
    line = await refused(LoadOptions(ranks=2, dequantize="packed"))
    assert "its processor multiplies by no quantized weights" in line


async def test_a_worker_that_is_refused_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "own_versions", lambda: own_versions() | {"mlx": "0.1"})
    async with listening() as (_, port):
        made = Worker(
            Settings(home=tmp_path), Server("127.0.0.1", port, SECRET), "second", [], DEVICE
        )
        with pytest.raises(Unavailable, match="refuses: it has mlx 0"):
            await asyncio.wait_for(made.run(), 5)
        other = Server("127.0.0.1", port, b"another of sixteen")
        made = Worker(Settings(home=tmp_path), other, "second", [], DEVICE)
        with pytest.raises(Unavailable, match="refuses: the secret is not the same"):
            await asyncio.wait_for(made.run(), 5)


# files


def test_digests_are_kept_until_files_change(tmp_path: Path, model: Path) -> None:
    files = ModelFiles(tmp_path / "home")
    first = files.digests(model)
    assert set(first) == {"config.json", "tokenizer.json", "model.safetensors"}
    kept = (tmp_path / "home" / "digests.json").read_text()
    forged = kept.replace(first["config.json"], "0" * 64)
    (tmp_path / "home" / "digests.json").write_text(forged)
    assert files.digests(model)["config.json"] == "0" * 64, "read again"
    os.utime(model / "config.json")
    assert files.digests(model) == first


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"a": "1"}, "it lacks b"),
        ({"a": "1", "b": "2", "c": "3"}, "it has a c more"),
        ({"a": "1", "b": "3"}, "its b differs"),
        ({"b": "2", "a": "1"}, None),
    ],
)
def test_differences_are_named(theirs: dict[str, str], said: str | None) -> None:
    assert difference({"a": "1", "b": "2"}, theirs) == said


# settings


def test_secrets_come_from_a_variable_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("of a file, long enough\n")
    file.chmod(0o600)
    assert secret_of(Settings()) is None
    assert secret_of(Settings(worker_secret_file=file)) == "of a file, long enough"
    both = Settings(worker_secret_file=file, worker_secret="of a variable, long enough")
    assert secret_of(both) == "of a variable, long enough"
    with pytest.raises(Unavailable, match="worker_secret: a secret has at least 16 characters"):
        secret_of(Settings(worker_secret="short"))
    with pytest.raises(Unavailable, match="worker_secret_file: No such file"):
        secret_of(Settings(worker_secret_file=tmp_path / "none"))


def test_workers_need_a_secret(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="workers must show a secret"):
        Machines(Settings(home=tmp_path, workers=["second"]))
    assert Machines(Settings(home=tmp_path)).of_model("any") == ()


def test_single_models_have_other_workers(tmp_path: Path) -> None:
    machines = Machines(
        Settings(
            home=tmp_path,
            workers=["second"],
            workers_by_model={"small": [], "large": ["second", "third"]},
            worker_secret="sixteen bytes at least",
        )
    )
    assert machines.of_model("any") == ("second",)
    assert machines.of_model("small") == ()
    assert machines.of_model("large") == ("second", "third")


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        machines = Machines(
            Settings(
                home=tmp_path,
                workers=["second"],
                worker_secret="sixteen bytes at least",
                worker_host="127.0.0.1",
                worker_port=port,
            )
        )
        with pytest.raises(Unavailable, match=f"on 127.0.0.1 port {port}: Address already in use"):
            await machines.start(DEVICE)
        await machines.stop()
