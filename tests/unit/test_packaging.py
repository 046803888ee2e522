"""What is shipped: the archive of the source, the wheel, the container."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.tiny import build_tiny_model

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both archives, the wheel made from the source's."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "mlx_server"], cwd=ROOT, capture_output=True)
    ours = set(listed.stdout.decode().split())
    assert ours <= names
    others = {name.split("/")[0] for name in names - ours if not name.startswith("mlx_server/")}
    assert others == {f"mlx_server-{PROJECT['version']}.dist-info"}


def test_the_archive_of_the_source_is_what_an_installation_needs(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "mlx_server/py.typed"}
    assert wanted <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", ".venv"))]


def test_the_container_is_given_what_it_copies() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    lines = re.findall(r"^COPY (?!--)(.*) \S+$", docker, re.MULTILINE)
    copied = [name for line in lines for name in line.split()]
    assert copied
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    assert {"cpu", "cuda12", "cuda13"} <= PROJECT["optional-dependencies"].keys()
    assert "EXTRA=cpu" in docker


@pytest.mark.soak
def test_a_bare_environment_serves_from_the_wheel_without_the_repository(
    built: Path, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    extra = "[cpu]" if sys.platform.startswith("linux") else ""
    install = [binaries / "python", "-m", "pip", "install", "-q", f"{wheel}{extra}"]
    subprocess.run([*install, "-c", ROOT / "constraints.txt"], check=True, cwd=tmp_path)
    model = build_tiny_model(tmp_path / "models" / "tiny", "llama")
    # Of this process's environment nothing that leads back here.
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [binaries / "mlx-server"]
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment)
    assert told.stdout.startswith(f"mlx-server {PROJECT['version']} (mlx ")
    serve = [*command, "serve", "--port", "0", "--model", model]
    with subprocess.Popen(
        serve, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as server:
        try:
            assert server.stdout is not None
            greeting = server.stdout.readline()
            url = re.search(r"answers at (\S+)", greeting)
            assert url, greeting
            assert _answer(url[1])
        finally:
            server.terminate()
    assert server.returncode == 0


def _answer(url: str) -> str:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        told = json.load(answer)
    return str(told["choices"][0]["finish_reason"])
