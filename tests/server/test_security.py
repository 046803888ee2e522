"""Keys and what they permit, pages of other origins, paths and addresses in the place of names."""

import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import MODEL
from tests.server.test_errors import assert_refused
from tests.support.server import CHAT, HELLO, PLAIN, Server, chat, serving

ALICE, OPS, WRONG = "alice-secret-1f0c", "ops-secret-77aa", "guessed-secret-0000"
BODY = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
TEXT = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
ELSEWHERE = "http://elsewhere.example"
FRIEND = "http://friend.example"


def write_keys(folder: Path) -> Path:
    """A file with a key of Alice's for inference, and one for administrators as a hash."""
    path = folder / "keys.toml"
    digest = sha256(OPS.encode()).hexdigest()
    path.write_text(
        f'[[keys]]\nname = "alice"\nkey = "{ALICE}"\n'
        f'[[keys]]\nname = "ops"\nsha256 = "{digest}"\nscopes = ["admin"]\n'
    )
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server with a file of keys and one origin that may call it, which logs all it can."""
    home = tmp_path_factory.mktemp("keyed")
    with serving(
        home,
        "--model",
        str(tiny_model),
        keys_file=str(write_keys(home)),
        cors_origins=[FRIEND],
        log_level="debug",
    ) as server:
        yield server


def call(server: Server, method: str, path: str, **options: object) -> httpx.Response:
    with httpx.Client(base_url=server.url, timeout=60, **PLAIN) as client:
        return client.request(method, path, **options)  # type: ignore[arg-type]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# keys


@pytest.mark.parametrize(
    ("key", "inference", "admin"), [(ALICE, 200, 403), (OPS, 200, 200), (WRONG, 401, 401)]
)
def test_a_key_of_the_file_permits_its_scopes_and_admin_everything(
    keyed: Server, key: str, inference: int, admin: int
) -> None:
    assert call(keyed, "POST", CHAT, json=BODY, headers=bearer(key)).status_code == inference
    assert call(keyed, "POST", CHAT, json=BODY, headers={"x-api-key": key}).status_code == inference
    assert call(keyed, "GET", "/admin/models", headers=bearer(key)).status_code == admin
    assert call(keyed, "GET", "/metrics", headers=bearer(key)).status_code == inference


@pytest.mark.parametrize(("path", "body"), [(CHAT, BODY), ("/v1/completions", TEXT)])
def test_only_an_admin_s_request_goes_before_those_of_others(
    keyed: Server, path: str, body: dict[str, object]
) -> None:
    for key, priority, status in ((ALICE, -1, 403), (ALICE, 1, 200), (OPS, -1, 200)):
        answer = call(keyed, "POST", path, json=body | {"priority": priority}, headers=bearer(key))
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["param"] == "priority"


def test_with_a_file_of_keys_nothing_but_health_is_open(keyed: Server) -> None:
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
        assert_refused(call(keyed, method, path), 401)
    assert call(keyed, "GET", "/health").status_code == 200


def test_the_log_names_the_key_and_never_shows_one(keyed: Server) -> None:
    shown = call(keyed, "POST", CHAT, json=BODY, headers=bearer(ALICE))
    refused = call(keyed, "POST", CHAT, json=BODY, headers=bearer(WRONG))
    log = keyed.log.read_text()
    assert '"key": "alice"' in log
    for secret in (ALICE, OPS, WRONG, sha256(OPS.encode()).hexdigest()):
        assert secret not in log
        assert secret not in shown.text + refused.text


def test_a_bad_file_of_keys_is_one_line_that_shows_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(b'[[keys]]\nname = "a b"\nkey = "hushhush"\n')
    line = startup_complaint(tmp_path, MLX_SERVER_KEYS_FILE=str(path))
    assert "keys.0.name" in line
    assert "hushhush" not in line


def startup_complaint(home: Path, *flags: str, **environment: str) -> str:
    """The one line that `serve` says before it gives up."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_server", "serve", "--port", "0", *flags],
        env=os.environ | {"MLX_SERVER_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode not in (0, None)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("mlx-server: ")
    return line


def test_inference_keys_are_needed_beyond_loopback_and_admin_keys_are_not_enough(
    tmp_path: Path,
) -> None:
    admin = {"MLX_SERVER_ADMIN_KEYS": '["boss"]'}
    assert "no API key" in startup_complaint(tmp_path, "--host", "0.0.0.0")
    assert "no API key" in startup_complaint(tmp_path, "--host", "0.0.0.0", **admin)


# pages of other origins


@pytest.mark.parametrize("origin", [ELSEWHERE, "null", "http://127.0.0.1:1", f"{FRIEND}.evil"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("POST", f"/admin/models/{MODEL}/unload"),
        ("DELETE", f"/admin/models/{MODEL}"),
    ],
)
def test_a_page_of_another_origin_changes_nothing(
    keyed: Server, origin: str, method: str, path: str
) -> None:
    answer = call(keyed, method, path, json=BODY, headers={**bearer(OPS), "origin": origin})
    assert assert_refused(answer, 403)["code"] == "invalid_origin"
    assert "access-control-allow-origin" not in answer.headers


def test_our_own_pages_and_those_that_are_named_may_ask(keyed: Server) -> None:
    behind_tls = keyed.url.replace("http://", "https://")
    for origin in (keyed.url, behind_tls, FRIEND):
        headers = {**bearer(ALICE), "origin": origin}
        assert call(keyed, "POST", CHAT, json=BODY, headers=headers).status_code == 200, origin


def test_cors_is_closed_unless_it_is_opened(server: Server, keyed: Server) -> None:
    def preflight(asked: Server, origin: str) -> httpx.Response:
        wanted = {"access-control-request-method": "POST", "origin": origin}
        return call(asked, "OPTIONS", CHAT, headers=wanted)

    for refused in (preflight(server, ELSEWHERE), preflight(keyed, ELSEWHERE)):
        assert refused.status_code >= 400
        assert "access-control-allow-origin" not in refused.headers
    allowed = preflight(keyed, FRIEND)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == FRIEND
    plain = call(server, "GET", "/v1/models", headers={"origin": ELSEWHERE})
    assert "access-control-allow-origin" not in plain.headers


def test_every_answer_tells_browsers_to_be_careful(server: Server) -> None:
    stream = chat(MODEL, stream=True, max_tokens=2)
    answers = [
        call(server, "GET", "/health"),
        call(server, "GET", "/nothing"),
        call(server, "POST", CHAT, json=stream),
        call(server, "GET", "/health", headers={"host": "evil.example"}),
        call(server, "GET", "/docs"),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in answers[-1].headers["content-security-policy"]


# names that are paths or addresses

PATHS = ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "..", "~", "%2e%2e%2fetc", "\\x"]


@pytest.mark.parametrize("name", [*PATHS, "http://127.0.0.1:1/m", f"{MODEL}@../../etc", "."])
def test_no_route_takes_a_path_or_an_address_for_a_model(
    client: httpx.Client, server: Server, tiny_model: Path, name: str
) -> None:
    for given in (name, str(tiny_model.parent / "." / name)):
        quoted = given.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")
        assert_refused(client.post(CHAT, json=BODY | {"model": given}), 404)
        assert_refused(client.get(f"/v1/models/{quoted}"), 404)
        assert_refused(client.post(f"/admin/models/{quoted}/load"), 404)
        assert_refused(client.post(f"/admin/models/{quoted}/unload"), 404)
        assert_refused(client.delete(f"/admin/models/{quoted}"), 404)
        pulled = client.post("/admin/models/pull", json={"model": given})
        assert pulled.status_code in (400, 404), pulled.text
    assert (tiny_model / "config.json").is_file()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1:1/a.png", "data:,x"])
def test_no_picture_is_fetched_or_read(client: httpx.Client, url: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [picture]}]
    assert_refused(client.post(CHAT, json=BODY | {"messages": messages}), 400)


def test_a_models_own_code_runs_only_where_the_operator_named_the_model(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "models" / "with-code"
    folder.mkdir(parents=True)
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    trace = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"model_file": "own.py",', 1))
    with serving(tmp_path, log_level="error") as server:
        answer = call(server, "POST", CHAT, json=BODY | {"model": "with-code"})
        assert_refused(answer, 503)
        assert not trace.exists()
    with serving(tmp_path, trust_remote_code=["with-code"]) as server:
        call(server, "POST", CHAT, json=BODY | {"model": "with-code"})
        assert trace.exists()
