"""What `launch` has to know of a program, and what it sets for one run of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_OUTPUT = 32_000


@dataclass(frozen=True)
class Target:
    """The model that a program shall use; `url` is the server's, without a path."""

    url: str
    key: str
    model: str
    context: int

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def output(self) -> int:
        """Tokens of an answer, for programs that must set some aside."""
        return min(MAX_OUTPUT, self.context // 4)


@dataclass(frozen=True)
class Setup:
    """`arguments` go before the user's; `files` into the run's temporary folder, by name. A `link`
    there, by name, is a file or folder of the user's own.
    """

    environment: Mapping[str, str]
    arguments: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """`needs`: tokens that its own instructions and tools took when it was tried; `recommended`: of
    context, for work with it.
    """

    name: str
    title: str
    executable: str
    install: str
    needs: int
    recommended: int
    set_up: Callable[[Target, Path], Setup]
    """The folder is the run's temporary one."""
