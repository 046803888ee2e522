"""`chat`: talk with a model of a running server, or have one question answered."""

import math
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_server.cli.completing import complete_model
from mlx_server.cli.options import (
    CommandError,
    ConfigOption,
    HostOption,
    JsonOption,
    KeyOption,
    PortOption,
    print_json,
)
from mlx_server.cli.remote import choose_model, find_remote, named_remote
from mlx_server.cli.terminal import quiet_keyboard

if TYPE_CHECKING:
    from mlx_server.cli.chat.conversation import Answer, Conversation


def chat(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="A question; without one, you are asked for them.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="ID", autocompletion=complete_model),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system prompt.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", "-f", help="Put before the question. Repeatable.")
    ] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="A JSON schema that answers follow.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: JsonOption = False,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Any server that speaks OpenAI's API.")
    ] = None,
    host: HostOption = None,
    port: PortOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Talk with a model. A file that is piped in goes before the question."""
    from mlx_server.cli.chat.conversation import Conversation
    from mlx_server.cli.chat.slash import attachment, read_schema

    parts = [attachment(str(one)) for one in file or ()]
    question = " ".join(prompt or ()).strip()
    if not sys.stdin.isatty() and (piped := sys.stdin.read().strip()):
        parts.append(piped)
    form = read_schema(schema) if schema else None
    remote = named_remote(url, api_key) if url else find_remote(host, port, api_key, config)
    conversation = Conversation(remote, choose_model(remote, model), system, form)
    if temperature is not None and not math.isfinite(temperature):
        raise CommandError("--temperature must be a number such as 0.7")
    given = {"temperature": temperature, "max_tokens": max_tokens}
    conversation.sampling |= {name: value for name, value in given.items() if value is not None}
    if question or not sys.stdin.isatty():
        whole = "\n\n".join([*parts, question] if question else parts)
        if not whole:
            raise CommandError("there is no question: say one, or pipe one in")
        _answer_once(conversation, whole, as_json)
    elif as_json:
        raise CommandError("--json is for a question that is given with the command")
    else:
        from mlx_server.cli.chat.talk import talk

        talk(conversation, parts, config)


def _answer_once(conversation: "Conversation", question: str, as_json: bool) -> None:
    from mlx_server.cli.chat.conversation import Answer

    answer = Answer()
    try:
        if as_json:
            for _ in conversation.ask(question, answer):
                pass  # `answer` gathers them
        else:
            show(conversation, question, answer, show_thinking=False)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        print_json({"model": conversation.model} | asdict(answer))


def show(
    conversation: "Conversation", question: str, answer: "Answer", show_thinking: bool
) -> None:
    """The answer as it comes: Markdown on a terminal, plain in a pipe."""
    from rich.console import Console

    from mlx_server.cli.chat.display import MarkdownStream, PlainStream

    console = Console()
    plain = not console.is_terminal or conversation.schema is not None
    with (
        quiet_keyboard(),
        PlainStream() if plain else MarkdownStream(console, show_thinking) as stream,
        closing(conversation.ask(question, answer)) as pieces,
    ):
        for piece in pieces:
            if piece.kind == "thinking":
                stream.think(piece.text)
            else:
                stream.write(piece.text, answer.thought)
