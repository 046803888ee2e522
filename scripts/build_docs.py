"""Builds the documentation as a site, without the network: `python scripts/build_docs.py [FOLDER]`.

The pages are those of docs/, with the repository's own (CONTRIBUTING.md and the like) and the API
reference beside them. Every warning is an error.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import yaml
from api_reference import page as api_page

from mlx_server.config import Settings
from mlx_server.main import create_app

ROOT = Path(__file__).parent.parent
OURS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "performance.md",
}
"""Pages from outside docs/, by their place in the repository."""
SECTIONS = {
    "Start here": ("index", "install", "running", "models", "cli", "settings"),
    "The API": ("openai", "anthropic", "ollama", "tools", "structured-output", "embeddings", "api"),
    "Clients": (
        *("clients/README", "clients/claude", "clients/codex", "clients/opencode"),
        *("clients/qwen", "clients/aider", "clients/llm", "clients/open-webui"),
        "clients/libraries",
    ),
    "Operation": (
        "caching",
        "speculation",
        "reliability",
        "distributed",
        "monitoring",
        "security",
        "mac",
        "troubleshooting",
    ),
    "Inside": ("architecture", "performance", "glossary", "contributing", "changelog"),
}
"""Pages in their order. Others come at the end; those that are not written are left out."""
THEME = {
    # Fonts would come from the network.
    "font": False,
    "features": ["navigation.sections", "navigation.indexes", "content.code.copy", "toc.follow"],
    "palette": [
        {
            "media": f"(prefers-color-scheme: {name})",
            "scheme": scheme,
            "toggle": {"icon": "lucide/sun-moon", "name": "Light or dark"},
        }
        for name, scheme in (("light", "default"), ("dark", "slate"))
    ],
}
EXTENSIONS = ["admonition", "attr_list", "tables", "toc", "pymdownx.highlight"]
EXTENSIONS += ["pymdownx.superfences", "pymdownx.inlinehilite"]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def build(site: Path) -> None:
    """Raises CalledProcessError where anything is amiss."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        gather(project / "docs")
        config = {
            "site_name": "mlx-server",
            "site_description": "An inference server for MLX language models",
            "theme": THEME,
            "markdown_extensions": EXTENSIONS,
            "nav": navigation(_pages(project / "docs")),
        }
        (project / "mkdocs.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        subprocess.run(command, cwd=project, check=True)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(project / "site", site)


def gather(docs: Path) -> None:
    """Every page in one folder, its links made to fit."""
    shutil.copytree(ROOT / "docs", docs)
    for place, name in OURS.items():
        shutil.copyfile(ROOT / place, docs / name)
    plots = ROOT / "benchmarks" / "plots"
    if plots.is_dir():
        shutil.copytree(plots, docs / "plots")
    home = Settings(home=docs.parent / "home")
    (docs / "api.md").write_text(api_page(create_app(home).openapi()), encoding="utf-8")
    origins = {docs / name: (ROOT / place).parent for place, name in OURS.items()}
    for path in docs.rglob("*.md"):
        folder = path.parent.relative_to(docs)
        fitted = partial(_fitted, origins.get(path, ROOT / "docs" / folder), folder)
        text = path.read_text(encoding="utf-8")
        path.write_text(LINK.sub(fitted, text), encoding="utf-8")


def _fitted(origin: Path, folder: Path, link: re.Match[str]) -> str:
    """A link to a file of the repository, from a page that was in `origin` and is in `folder`."""
    target = (origin / link[1]).resolve()
    place = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
    for kept in ("docs/", "benchmarks/"):
        if place.startswith(kept) and place not in OURS:
            return f"]({os.path.relpath(place.removeprefix(kept), folder)}{link[2] or ''})"
    if place in OURS:
        return f"]({os.path.relpath(OURS[place], folder)}{link[2] or ''})"
    return link[0]


def _pages(docs: Path) -> set[str]:
    return {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}


def navigation(pages: set[str]) -> list[dict[str, list[str]]]:
    named = {page for section in SECTIONS.values() for page in section}
    others = sorted(pages - named)
    sections = {**SECTIONS, **({"More": tuple(others)} if others else {})}
    return [
        {title: [f"{page}.md" for page in section if page in pages]}
        for title, section in sections.items()
    ]


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site")
