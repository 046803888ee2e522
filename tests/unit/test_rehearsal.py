"""What rehearsed models are made of, and that the guides tell what the tests tried."""

from itertools import chain
from pathlib import Path

import pytest

from mlx_server.cli.launch.programs import PROGRAMS
from tests.clients.installing import Npm, Python, Wanted
from tests.clients.test_agents import INSTALLS
from tests.clients.test_libraries import AI_SDK, PYTHON
from tests.clients.test_open_webui import WEBUI
from tests.support.rehearsal import cut_into_pieces

GUIDES = Path(__file__).parent.parent.parent / "docs" / "clients"
TRIED: dict[str, Wanted] = {name: wanted for name, (_, wanted) in INSTALLS.items()}
TRIED["open-webui"] = WEBUI


def test_no_two_pieces_of_all_scripts_are_alike() -> None:
    texts = ["again and again and again and so on", "again and again", "so on and on"]
    cut = cut_into_pieces(texts)
    assert ["".join(pieces) for pieces in cut] == texts
    pieces = list(chain.from_iterable(cut))
    assert len(pieces) == len(set(pieces))


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_has_a_guide_with_the_version_that_was_tried(program: str) -> None:
    text = (GUIDES / f"{program}.md").read_text(encoding="utf-8")
    assert all(version in text for version in versions(TRIED[program]))
    assert PROGRAMS[program].install in text
    assert f"mlx-server launch {program} " in text
    index = (GUIDES / "README.md").read_text(encoding="utf-8")
    assert f"({program}.md) | {versions(TRIED[program])[0]} |" in index


def test_the_guide_of_libraries_has_the_versions_that_were_tried() -> None:
    text = (GUIDES / "libraries.md").read_text(encoding="utf-8")
    tried = [wanted for _, wanted in PYTHON.values()]
    assert all(version in text for one in (*tried, AI_SDK) for version in versions(one)[:3])


def versions(wanted: Wanted) -> list[str]:
    mark = "==" if isinstance(wanted, Python) else "@"
    assert isinstance(wanted, Python | Npm)
    return [package.rpartition(mark)[2] for package in wanted.packages]
