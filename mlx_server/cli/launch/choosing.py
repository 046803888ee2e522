"""Which model a program gets."""

import difflib
import sys

import typer

from mlx_server.cli.launch.program import Program, Target
from mlx_server.cli.launch.servers import Offer, Server
from mlx_server.cli.options import CommandError

UNKNOWN_CONTEXT = 32_768
"""Told to programs that ask for a number."""


def chosen(offers: list[Offer], name: str | None) -> Offer:
    """The one of that name, the only one, the one that the user picks, or the only one loaded."""
    if name is not None:
        return _named(offers, name)
    if not offers:
        raise CommandError("there is no model yet: `mlx-server pull ORG/NAME` fetches one")
    if len(offers) == 1:
        return offers[0]
    if sys.stdin.isatty() and sys.stderr.isatty():
        return _asked(offers)
    loaded = [offer for offer in offers if offer.loaded]
    if len(loaded) == 1:
        return loaded[0]
    names = ", ".join(offer.id for offer in offers)
    raise CommandError(f"which model? Say --model with one of {names}")


def _named(offers: list[Offer], name: str) -> Offer:
    for offer in offers:
        if name == offer.id or name in offer.aliases:
            return offer
    close = difflib.get_close_matches(name, [offer.id for offer in offers], cutoff=0.5)
    hint = f" Close: {', '.join(close)}." if close else ""
    raise CommandError(f"the server has no chat model {name!r}.{hint}")


def _asked(offers: list[Offer]) -> Offer:
    for number, offer in enumerate(offers, start=1):
        context = f"{offer.context:,} tokens" if offer.context else ""
        loaded = "loaded" if offer.loaded else ""
        typer.echo(f"{number:3}  {offer.id}  {context}  {loaded}".rstrip(), err=True)
    default = next((i for i, offer in enumerate(offers, start=1) if offer.loaded), 1)
    number = 0
    while not 1 <= number <= len(offers):
        number = typer.prompt("Model", default=default, type=int, err=True)
    return offers[number - 1]


def advice(program: Program, offer: Offer) -> str | None:
    """For a context that is short. Raises CommandError if the program cannot even begin."""
    context = offer.context
    if context is None or context >= program.recommended:
        return None
    has = f"{offer.id} has a context of {context:,} tokens"
    if context < program.needs:
        raise CommandError(
            f"{has}, and {program.title} begins with about {program.needs:,} of its own:"
            f" choose a model with {program.recommended:,} or more"
        )
    return f"{has}; {program.title} works better with {program.recommended:,} or more"


def target_of(server: Server, offer: Offer) -> Target:
    return Target(server.url, server.key, offer.id, offer.context or UNKNOWN_CONTEXT)
