"""The conversation at a terminal: a line editor with history, answers, /commands."""

import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from mlx_server.cli.chat import slash
from mlx_server.cli.chat.command import show
from mlx_server.cli.chat.conversation import Answer, Conversation
from mlx_server.cli.options import CommandError, load_settings
from mlx_server.errors import ServerError

HISTORY = "chat_history"


def talk(conversation: Conversation, attached: list[str], config: Path | None) -> None:
    """Until /exit or Ctrl-D; Ctrl-C stops an answer, or empties the line."""
    console = Console(highlight=False)
    session = slash.Session(conversation, list(attached))
    editor = _editor(load_settings(config).home)
    hint = "/help lists commands, Ctrl-D leaves"
    console.print(Text(f"{conversation.model} at {conversation.remote.url}. {hint}.", style="dim"))
    while not session.ended:
        try:
            line = editor.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line:
            _turn(line, session, console)


def _turn(line: str, session: slash.Session, console: Console) -> None:
    """What goes wrong is told, and the conversation goes on."""
    try:
        if line.startswith("/"):
            if told := slash.run(line, session):
                console.print(Text(told, style="dim"))
            question, session.retry = session.retry, None
        else:
            question = session.question(line)
        if question is not None:
            _answer(question, session, console)
    except (CommandError, ServerError) as error:
        console.print(Text(str(error), style="red"))


def _answer(question: str, session: slash.Session, console: Console) -> None:
    answer = Answer()
    session.unanswered = question
    try:
        show(session.conversation, question, answer, session.show_thinking)
    except KeyboardInterrupt:
        console.print(Text("stopped", style="dim"))
        return
    finally:
        if answer.text:
            session.unanswered = None
    console.print(Text(answer.summary, style="dim"))
    console.print()


def _editor(home: Path) -> "PromptSession[str]":
    words = WordCompleter([f"/{name}" for name in slash.COMMANDS], sentence=True)
    return PromptSession(
        history=_history(home),
        completer=words,
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation="  ",
    )


def _history(home: Path) -> History:
    """Readable by this user alone; of this conversation only where the home cannot be written."""
    file = home / HISTORY
    try:
        home.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter and Ctrl-J begin a new line, as does a paste of several."""
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
