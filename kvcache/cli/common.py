"""What all commands share: how they print, what `--json` means, and how a wrong request is said."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcache.errors import InputError
from kvcache.policies import parse_bytes

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
"""The option that every command has."""

_GIGA, _MEGA, _KILO = 2**30, 2**20, 2**10


class Wanting(Exception):
    """What was asked for was looked at, and is not as it should be: exit code 1."""


def console() -> Console:
    """For tables and bars, as wide as the terminal, and wide enough where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def progress() -> Console:
    """For what is under way, on standard error, so that standard output is the answer alone."""
    return Console(stderr=True)


def print_json(answer: Mapping[str, Any]) -> None:
    """The answer as JSON on standard output."""
    print(json.dumps(answer, indent=1, allow_nan=False))


def table(title: str, *columns: str, right: int = 1) -> Table:
    """An empty table; its columns are aligned to the right from number `right` on."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i >= right else "left")
    return made


def shown_bytes(count: float) -> str:
    """A number of bytes for people: ``1.5 GiB``, ``12.3 MiB``, ``512 B``."""
    for unit, size in (("GiB", _GIGA), ("MiB", _MEGA), ("KiB", _KILO)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GiB" else f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def bytes_of(option: str, given: str | None) -> int | None:
    """The number of bytes that an option such as ``--memory 24GiB`` means.

    Raises:
        InputError: with the option's name.
    """
    if given is None:
        return None
    try:
        return parse_bytes(given)
    except ValueError as error:
        raise InputError(
            f"{option} {given} is no size; give a number of bytes, or one such as 512MiB or 1.5GB"
        ) from error


def at_least(option: str, given: int | None, least: int) -> None:
    """Raise `InputError`, with the option's name, for a number that is too small."""
    if given is not None and given < least:
        raise InputError(f"{option} {given}: give at least {least}")


def one_line(error: object) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def usage(error: Exception) -> str | None:
    """One line for an error of the command line's own grammar, None for any other.

    Typer brings these errors from click, or from its own copy of it, by release: so they are told by what they have.
    """
    said = getattr(error, "format_message", None)
    if said is None or getattr(error, "exit_code", None) != 2:
        return None
    context = getattr(error, "ctx", None)
    command = "kvcache" if context is None else context.command_path
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        return str(said())
    return f"{command}: {one_line(said()).rstrip('.')}; run {command} --help"
