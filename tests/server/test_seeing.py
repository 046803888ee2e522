"""What operators see of a server: traces, records, history, metrics, logs, and a reload."""

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.server.test_errors import assert_refused
from tests.server.test_tools import TOOLS
from tests.support.otlp import Node, Receiver, receiving
from tests.support.server import CHAT, PLAIN, Server, ask, chat, serving, stream_data, until
from tests.support.tiny import build_tiny_model

MODEL = "tiny"
SPOKEN = 3
"""Events of a stream after which it surely has tokens."""
SOON = 30.0
DOCS = Path(__file__).parents[2] / "docs" / "monitoring"
MONITORING = {file.name: file.read_text() for file in DOCS.iterdir()}
NAMES_IN_QUERIES = re.compile(r"\b(?:vllm:|mlx_server_|process_)\w+")
STAGES = ["load", "render", "queue", "prefill", "decode"]
NEEDS_PROMTOOL = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text('api_keys = ["boss"]\n')
    return file


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, receiver: Receiver, config: Path
) -> Iterator[Server]:
    path = build_tiny_model(
        tmp_path_factory.mktemp("models") / MODEL, family="qwen", context=2048, layers=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        flags = ("--model", str(path), "--config", str(config))
        with serving(tmp_path_factory.mktemp("home"), *flags) as server:
            yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client(headers={"x-api-key": "boss"}) as client:
        yield client


def configure(file: Path, *lines: str) -> None:
    file.write_text("\n".join(lines))


async def traced(
    client: httpx.AsyncClient, receiver: Receiver, body: dict[str, Any]
) -> tuple[httpx.Response, Node]:
    """The answer, read to its end, and the tree of its spans, in a trace of the caller's."""
    trace, header = _new_trace()
    answer = await client.post(CHAT, json=body, headers=header)
    return answer, await _tree(receiver, trace)


def _new_trace() -> tuple[str, dict[str, str]]:
    """Its id, and the header by which a caller has a request be part of it."""
    trace = secrets.token_hex(16)
    return trace, {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}


async def _tree(receiver: Receiver, trace: str) -> Node:
    async def whole() -> bool:
        return receiver.tree(trace) is not None

    await until(whole, SOON, lambda: "no whole trace has come")
    tree = receiver.tree(trace)
    assert tree is not None
    return tree


async def recorded(client: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    listed = (await client.get("/admin/requests")).json()["ended"]
    wanted = answer.headers["x-request-id"]
    return next(one for one in listed if one["id"] == wanted)


def logged(server: Server, request_id: str) -> dict[str, Any]:
    lines = [json.loads(x) for x in server.log.read_text().splitlines() if x.startswith("{")]
    [line] = [x for x in lines if x["event"] == "request" and x["request_id"] == request_id]
    return line


# traces, with the record and the log line of the same request


async def test_a_streamed_chat_with_a_call_is_one_trace_of_its_stages(
    server: Server, receiver: Receiver, client: httpx.AsyncClient
) -> None:
    body = chat(MODEL, stream=True, tools=TOOLS, tool_choice="required", max_tokens=300)
    answer, tree = await traced(client, receiver, body)
    assert tree.name == f"POST {CHAT}"
    assert tree.attributes["http.response.status_code"] == 200
    [generation] = tree.below
    assert generation.name == f"chat {MODEL}"
    assert generation.names() in ([*STAGES, "stream"], [*STAGES[:-1], "stream", "decode"])
    shown = generation.attributes
    record = await recorded(client, answer)
    assert shown["gen_ai.response.finish_reasons"] == record["finish"]
    assert record["finish"] in (["tool_calls"], ["length"])
    assert shown["gen_ai.usage.input_tokens"] == record["prompt_tokens"] > 0
    assert shown["gen_ai.usage.output_tokens"] == record["completion_tokens"] > 0
    assert shown["gen_ai.request.stream"] is True
    assert shown["gen_ai.response.time_to_first_chunk"] == record["first_token_seconds"]
    assert "gen_ai.input.messages" not in shown
    assert receiver.services == {"mlx-server"}
    assert (record["protocol"], record["path"], record["client"]) == ("openai", CHAT, "key-0")
    assert (record["status"], record["stream"], record["error"]) == (200, True, None)
    line = logged(server, record["id"])
    assert line["level"] == "info"
    for field in ("model", "prompt_tokens", "cached_tokens", "completion_tokens"):
        assert line[field] == record[field], field
    for field in ("load", "render", "queue", "prefill", "decode", "ttft"):
        assert line[field] >= 0, field


async def test_the_trace_of_a_request_whose_engine_dies_shows_both_engines(
    server: Server, receiver: Receiver, client: httpx.AsyncClient
) -> None:
    body = chat(MODEL, max_tokens=600, ignore_eos=True, stream=True)
    trace, header = _new_trace()
    [engine] = server.engines()
    async with client.stream("POST", CHAT, json=body, headers=header) as answer:
        said = 0
        async for _ in stream_data(answer):
            said += 1
            if said == SPOKEN:
                os.kill(engine.pid, signal.SIGKILL)
    assert said > SPOKEN
    [generation] = (await _tree(receiver, trace)).below
    assert not generation.failed
    restart = generation.names().index("restart")
    broken = generation.below[restart - 1]
    assert (broken.failed, broken.attributes["error.type"]) == (True, "engine_ended")
    assert generation.names()[restart:] == ["restart", "prefill", "decode"]
    record = await recorded(client, answer)
    assert (record["engine_ends"], record["finish"]) == (1, ["length"])


async def test_the_traces_of_refused_requests_say_why(
    receiver: Receiver, client: httpx.AsyncClient
) -> None:
    answer, tree = await traced(client, receiver, chat("nothing"))
    assert_refused(answer, 404)
    assert tree.attributes["http.response.status_code"] == 404
    assert tree.attributes["mlx_server.error"] == "model_not_found"
    [generation] = tree.below
    assert (generation.failed, generation.names()) == (True, ["load"])
    record = await recorded(client, answer)
    assert (record["status"], record["error"]) == (404, "model_not_found")
    assert record["finish"] == ["error"]
    answer, tree = await traced(client, receiver, {"model": MODEL, "messages": []})
    assert_refused(answer, 400)
    assert tree.below == []
    assert (await recorded(client, answer))["operation"] is None


# the admin routes


async def test_any_key_is_an_admin_key_when_there_are_no_others(
    server: Server, client: httpx.AsyncClient
) -> None:
    async with server.client() as stranger:
        assert_refused(await stranger.get("/admin/models"), 401)
    assert (await client.get("/admin/models")).status_code == 200


async def test_requests_in_work_are_listed_and_asking_is_no_request(
    client: httpx.AsyncClient,
) -> None:
    asking = asyncio.create_task(
        client.post(CHAT, json=chat(MODEL, max_tokens=1000, ignore_eos=True))
    )

    async def listed() -> list[dict[str, Any]]:
        return list((await client.get("/admin/requests")).json()["running"])

    await until(listed, SOON)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    async def gone() -> bool:
        return not await listed()

    await until(gone, SOON)
    [last] = (await client.get("/admin/requests", params={"limit": 1})).json()["ended"]
    assert last["finish"] == ["abort"]
    assert last["path"] == CHAT
    assert_refused(await client.get("/admin/requests", params={"limit": -1}), 400)


async def test_history_has_a_sample_each_five_seconds(client: httpx.AsyncClient) -> None:
    samples: list[dict[str, Any]] = []

    async def sampled() -> bool:
        """The first may be older than the engine."""
        samples[:] = (await client.get("/admin/history")).json()["samples"]
        return bool(samples) and MODEL in samples[-1]["models"]

    await until(sampled, SOON)
    assert samples[-1]["event_loop_lag_p99"] >= 0
    later = await client.get("/admin/history", params={"since": samples[-1]["at"]})
    assert samples[-1] not in later.json()["samples"]


# metrics


@NEEDS_PROMTOOL
async def test_metrics_pass_promtool_but_for_the_colon_of_vllms_names(
    client: httpx.AsyncClient,
) -> None:
    await ask(client, CHAT, chat(MODEL, max_tokens=3))
    text = (await client.get("/metrics")).text
    complaints = _promtool(text).splitlines()
    assert complaints
    for complaint in complaints:
        assert complaint.startswith("vllm:"), complaint
        assert complaint.endswith("metric names should not contain ':'"), complaint
    assert _promtool(text.replace("vllm:", "vllm_")) == ""


def _promtool(text: str) -> str:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    return checked.stdout + checked.stderr


async def test_every_figure_is_documented_and_every_documented_one_exists(
    client: httpx.AsyncClient,
) -> None:
    await ask(client, CHAT, chat(MODEL, max_tokens=3))
    text = (await client.get("/metrics")).text
    shown = set(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))
    shown = {name.removesuffix("_created") for name in shown if not name.endswith("_created")}
    documented = re.findall(r"`((?:vllm:|mlx_server_|process_)\w+)`", MONITORING["README.md"])
    # Python cannot tell all of the process's figures everywhere.
    assert {name for name in shown ^ set(documented) if not name.startswith("process_")} == set()


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus")
async def test_every_query_of_dashboard_and_alerts_names_metrics_that_prometheus_has(
    server: Server, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    await ask(client, CHAT, chat(MODEL, max_tokens=3))
    queries = [*_dashboard_queries(), *_alert_queries()]
    names = {name for query in queries for name in NAMES_IN_QUERIES.findall(query)}
    assert len(queries) > 30
    targets = ""
    async with scraped(server, tmp_path) as prometheus:

        async def has(query: str) -> list[Any]:
            answer = await prometheus.get("/api/v1/query", params={"query": query})
            assert answer.status_code == 200, (query, answer.text)
            return list(answer.json()["data"]["result"])

        async def scrapes() -> bool:
            nonlocal targets
            targets = (await prometheus.get("/api/v1/targets")).text
            return bool(await has("vllm:generation_tokens_total > 0"))

        await until(scrapes, SOON, lambda: targets)
        for name in sorted(names):
            assert await has(f'{{__name__="{name}"}}'), name
        for query in queries:
            await has(query)


def _dashboard_queries() -> list[str]:
    panels = json.loads(MONITORING["grafana.json"])["panels"]
    texts = [target["expr"] for panel in panels for target in panel["targets"]]
    for variable, value in {"rate_interval": "1m", "range": "1h"}.items():
        texts = [text.replace(f"$__{variable}", value) for text in texts]
    return [text.replace("$model_name", ".*") for text in texts]


def _alert_queries() -> list[str]:
    [group] = yaml.safe_load(MONITORING["alerts.yml"])["groups"]
    return [rule["expr"] for rule in group["rules"]]


@asynccontextmanager
async def scraped(server: Server, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A Prometheus that reads our alert rules and scrapes `server` all the time."""
    written = yaml.safe_load(MONITORING["prometheus.yml"])
    [job] = written["scrape_configs"]
    job |= {"scrape_interval": "1s", "scrape_timeout": "1s"}
    job |= {"authorization": {"credentials": "boss"}}
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    configure(folder / "prometheus.yml", yaml.safe_dump(written))
    configure(folder / "alerts.yml", MONITORING["alerts.yml"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        *(f"--{name}={value}" for name, value in flags.items()),
        f"--web.listen-address={place}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{place}", **PLAIN) as client:

            async def ready() -> bool:
                try:
                    return (await client.get("/-/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(ready, SOON)
            yield client
    finally:
        process.kill()
        await process.wait()


# reload


async def test_keys_limits_and_names_change_while_a_stream_goes_on(
    server: Server, client: httpx.AsyncClient, config: Path
) -> None:
    body = chat(MODEL, stream=True, max_tokens=400, ignore_eos=True)
    streaming = asyncio.create_task(ask(client, CHAT, body))
    configure(
        config,
        'api_keys = ["boss", "second"]',
        "requests_per_minute = 1000",
        'aliases = {nick = "tiny"}',
        "max_batch = 3",
    )
    answer = await client.post("/admin/reload")
    assert answer.status_code == 200, answer.text
    assert sorted(answer.json()["changed"]) == ["aliases", "api_keys", "requests_per_minute"]
    assert answer.json()["need_restart"] == ["max_batch"]
    async with server.client(headers={"x-api-key": "second"}) as other:
        named = await other.post(CHAT, json=chat("nick", max_tokens=1))
        assert named.status_code == 200, named.text
        assert named.headers["x-ratelimit-limit-requests"] == "1000"
    assert (await streaming).done


async def test_sighup_reloads_and_wrong_settings_change_nothing(
    server: Server, client: httpx.AsyncClient, config: Path
) -> None:
    for line in ('max_batch = "many"', "", "nonsense"):
        configure(config, line)
        assert_refused(await client.post("/admin/reload"), 400)
    configure(config, 'api_keys = ["boss"]', 'aliases = {other = "tiny"}')
    server.process.send_signal(signal.SIGHUP)

    async def known() -> bool:
        answer = await client.post(CHAT, json=chat("other", max_tokens=1))
        return answer.status_code == 200

    await until(known, SOON)
    assert_refused(await client.post(CHAT, json=chat("nick")), 404)
    async with server.client(headers={"x-api-key": "second"}) as other:
        assert_refused(await other.post(CHAT, json=chat(MODEL)), 401)
