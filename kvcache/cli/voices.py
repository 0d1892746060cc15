"""`kvcache voices`."""

import typer

from kvcache.cli.common import Json, Wanting

app = typer.Typer(help="Voices and other prefixes in a store.", no_args_is_help=True)


@app.command("list")
def show_all(as_json: Json = False) -> None:
    """Not there yet."""
    raise Wanting("kvcache voices is not built yet")
