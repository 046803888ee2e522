"""The /commands of a chat."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_server.cli.chat.conversation import Conversation
from mlx_server.cli.options import CommandError
from mlx_server.cli.remote import choose_model

MAX_FILE = 4_000_000
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty")


@dataclass
class Session:
    """What /commands change. `attached` goes before the next question; `retry` is asked again;
    `unanswered` is the last question, with what was attached to it, if nothing came of it.
    """

    conversation: Conversation
    attached: list[str] = field(default_factory=list)
    retry: str | None = None
    unanswered: str | None = None
    show_thinking: bool = False
    ended: bool = False

    def question(self, text: str) -> str:
        whole = "\n\n".join([*self.attached, text])
        self.attached.clear()
        return whole


def run(line: str, session: Session) -> str:
    """Carries out `/name argument`; returns what to tell. Raises CommandError."""
    name, _, argument = line[1:].partition(" ")
    name = OTHER_NAMES.get(name, name)
    if name not in COMMANDS:
        known = ", ".join(f"/{one}" for one in COMMANDS)
        raise CommandError(f"there is no /{name}; there are {known}")
    return COMMANDS[name].run(session, argument.strip())


def attachment(path: str) -> str:
    """A file's text under its name. Raises CommandError."""
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > MAX_FILE:
            raise CommandError(f"{path} has more than {MAX_FILE // 10**6} MB")
        return f"{file.name}:\n```\n{file.read_text(encoding='utf-8').rstrip()}\n```"
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no text in UTF-8") from error
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error


def read_schema(given: str) -> dict[str, Any]:
    """A JSON schema, or a file of one. Raises CommandError."""
    try:
        text = given if given.lstrip().startswith("{") else Path(given).expanduser().read_text()
        schema = json.loads(text)
    except OSError as error:
        raise CommandError(f"the schema {given} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise CommandError("the schema must be a JSON object")
    return schema


def _help(session: Session, argument: str) -> str:
    lines = [f"/{name:<9} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "Alt-Enter begins a new line, Ctrl-C stops an answer."])


def _model(session: Session, argument: str) -> str:
    conversation = session.conversation
    if argument:
        conversation.model = choose_model(conversation.remote, argument)
        return f"The model is {conversation.model}."
    ids = (model["id"] for model in conversation.remote.chat_models())
    return "\n".join(f"{'*' if one == conversation.model else ' '} {one}" for one in ids)


def _system(session: Session, argument: str) -> str:
    session.conversation.system = argument or None
    return "The system prompt is set." if argument else "There is no system prompt."


def _set(session: Session, argument: str) -> str:
    sampling = session.conversation.sampling
    if not argument:
        shown = ", ".join(f"{name} {value}" for name, value in sampling.items())
        return shown or f"The model's own: {', '.join(NUMBERS)} can be set."
    name, _, value = argument.partition(" ")
    if name not in NUMBERS:
        raise CommandError(f"/set knows {', '.join(NUMBERS)}")
    if not value:
        sampling.pop(name, None)
        return f"{name} is the model's own."
    sampling[name] = _number(value)
    return f"{name} is {sampling[name]}."


def _number(text: str) -> float:
    try:
        number = int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError as error:
        raise CommandError(f"{text!r} is no number") from error
    if not math.isfinite(number):
        raise CommandError(f"{text!r} is no number that JSON has")
    return number


def _schema(session: Session, argument: str) -> str:
    off = argument in ("", "off")
    session.conversation.schema = None if off else read_schema(argument)
    return "Answers are free." if off else "Answers follow the schema."


def _file(session: Session, argument: str) -> str:
    session.attached.append(attachment(argument))
    return "It goes with your next question."


def _retry(session: Session, argument: str) -> str:
    session.retry = session.unanswered or session.conversation.take_back()
    if session.retry is None:
        raise CommandError("there is nothing to ask again")
    return ""


def _undo(session: Session, argument: str) -> str:
    if session.conversation.take_back() is None:
        raise CommandError("there is nothing to take back")
    return "The last question is taken back."


def _clear(session: Session, argument: str) -> str:
    session.conversation.messages.clear()
    session.attached.clear()
    session.unanswered = None
    return "The conversation begins anew."


def _think(session: Session, argument: str) -> str:
    session.show_thinking = not session.show_thinking
    return "Thinking is kept on the screen." if session.show_thinking else "Thinking is folded."


def _save(session: Session, argument: str) -> str:
    if not argument:
        raise CommandError("say /save FILE")
    parts = [f"## {one['role']}\n\n{one['content']}\n" for one in session.conversation.messages]
    try:
        Path(argument).expanduser().write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{argument} cannot be written: {error.strerror}") from error
    return f"{argument} is written."


def _exit(session: Session, argument: str) -> str:
    session.ended = True
    return ""


@dataclass(frozen=True)
class Command:
    help: str
    run: Callable[[Session, str], str]


COMMANDS = {
    "help": Command("this list", _help),
    "model": Command("[ID] show the models, or change to one", _model),
    "system": Command("[TEXT] set the system prompt, or remove it", _system),
    "set": Command("[NAME [NUMBER]] sampling, such as /set temperature 0.2", _set),
    "schema": Command("FILE|JSON|off  answers that follow a JSON schema", _schema),
    "file": Command("PATH  put a file before the next question", _file),
    "retry": Command("ask the last question again", _retry),
    "undo": Command("take the last question back", _undo),
    "clear": Command("begin anew", _clear),
    "think": Command("keep thinking on the screen, or fold it", _think),
    "save": Command("FILE  write the conversation as Markdown", _save),
    "exit": Command("leave (Ctrl-D does, too)", _exit),
}
OTHER_NAMES = {"?": "help", "bye": "exit", "quit": "exit"}
"""What people try who know other programs."""
