"""What all commands share: how they print, what `--json` means, and how a wrong request is said."""

import json
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcache.errors import InputError
from kvcache.io import parse_bytes, printable

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
"""The option that every command has."""

_GIGA, _MEGA, _KILO = 2**30, 2**20, 2**10


class CheckFailed(Exception):
    """What was asked for was looked at, and is not as it should be: exit code 1."""


class _Screen(Console):
    """Shows a text as it stands, whoever wrote it: nothing in it is markup, the name of an emoji, or steers the terminal."""

    def __init__(self, width: int | None = None, *, stderr: bool = False) -> None:
        super().__init__(width=width, stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)


def console(least: int = 0) -> Console:
    """For tables and bars, as wide as the terminal, and wide enough where there is none; `least` columns at least."""
    found = _Screen()
    width = found.width if found.is_terminal else 120
    return _Screen(max(width, least))


def display(*shown: Table | Text | str, style: str | None = None) -> None:
    """Print tables and lines: figures are never cut, though a line may be wider than the terminal for it."""
    wide = _Screen(10_000)
    least = max((wide.measure(one).minimum for one in shown if isinstance(one, Table)), default=0)
    screen = console(least)
    for one in shown:
        screen.print(one, style=style, soft_wrap=isinstance(one, str))


def bar(share: float, width: int, filled: str = "█") -> str:
    """A bar of that share of a width, in characters that standard output can show."""
    return ("#" if Console().options.ascii_only else filled) * round(width * share)


def progress() -> Console:
    """For what is under way, on standard error, so that standard output is the answer alone."""
    return _Screen(stderr=True)


def print_json(answer: Mapping[str, Any]) -> None:
    """The answer as JSON on standard output; null stands for a number that JSON does not have, such as infinity."""
    print(json.dumps(_finite(answer), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(title: str, *columns: str, right: int = 1) -> Table:
    """An empty table; its columns are aligned to the right from number `right` on, and hold figures, which are not divided."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i >= right else "left", no_wrap=i >= right, overflow="fold")
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
            f"{option} {given} is no size; give a number of bytes, or one such as 512MiB, 2G, 2Gi or 1.5GB"
        ) from error


def at_least(option: str, given: int | None, least: int) -> None:
    """Raise `InputError`, with the option's name, for a number that is too small."""
    if given is not None and given < least:
        raise InputError(f"{option} {given}: give at least {least}")


def threads_of(given: int | None) -> None:
    """Let torch run so many threads; None leaves it as it is.

    Raises:
        InputError: for fewer than one, or more than there are CPUs, which would only wait for each other.
    """
    at_least("--threads", given, 1)
    if given is None:
        return
    if given > (most := os.cpu_count() or 1):
        raise InputError(f"--threads {given}: this machine has {most} CPUs; give at most as many")
    import torch  # not where a command without a model is run

    torch.set_num_threads(given)


def one_line(error: object) -> str:
    """An error's message without line breaks, nor anything else that steers a terminal."""
    return printable(" ".join(str(error).split()))


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
