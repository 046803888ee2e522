"""The programs that `launch` knows, a module each."""

from mlx_server.cli.launch.program import Program
from mlx_server.cli.launch.programs import (
    aider,
    claude,
    codex,
    llm,
    open_webui,
    opencode,
    qwen,
)

PROGRAMS: dict[str, Program] = {
    one.PROGRAM.name: one.PROGRAM for one in (claude, codex, opencode, aider, qwen, llm, open_webui)
}
