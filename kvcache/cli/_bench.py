"""`kvcache bench`: the project's benchmarks by name."""

from pathlib import Path
from typing import Annotated

import typer

from kvcache.cli._common import Json, display, print_json, table
from kvcache.errors import InputError
from kvcache.tools import benchmarks, benchmarks_folder, run_benchmark

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
"""What follows the name is the benchmark's own."""


def command(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME [ITS OPTIONS]...]", help="Of the one to run; without, all are listed."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="CHECKOUT", help="Where they are; by default where this package is.")
    ] = None,
    as_json: Json = False,
) -> int:
    """List the project's benchmarks, or run one; what stands behind its name goes to it.

    For example: kvcache bench t3_decode --quick --json result.json
    """
    place = benchmarks_folder(folder)
    if name is None:
        found = benchmarks(place)
        if as_json:
            print_json({"folder": str(place), "benchmarks": found})
        else:
            shown = table(str(place), "name", "what it measures", right=2)
            for one, said in found.items():
                shown.add_row(one, said)
            display(shown)
        return 0
    if as_json:
        raise InputError(f"--json before the name is for the list; give kvcache bench {name} --json FILE")
    rest = context.args
    return run_benchmark(place, name, rest[1:] if rest[:1] == ["--"] else rest)
