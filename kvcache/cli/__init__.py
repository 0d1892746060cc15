"""The command `kvcache`: plan, profile, tune, bench, voices, doctor. A file for each, and `kvcache.cli.common` for what they share."""

import sys
from importlib import import_module
from typing import Any

from kvcache.errors import KVCacheError

_COMMANDS = {  # name of the command: where its function is, and whether it is a group of commands
    "doctor": "kvcache.cli.doctor",
    "plan": "kvcache.cli.plan",
    "profile": "kvcache.cli.profile",
    "tune": "kvcache.cli.tune",
    "bench": "kvcache.cli.bench",
    "voices": "kvcache.cli.voices",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 if what was asked for was found wanting, 2 for a wrong request.

    A wrong request says in one line what is wrong and what to do, on standard error.
    """
    try:
        import typer  # noqa: F401
    except ImportError:
        print('kvcache: the command needs typer and rich; run: pip install "kvcache[cli]"', file=sys.stderr)
        return 2
    from kvcache.cli.common import Wanting, one_line, usage

    try:
        found = application()(arguments, prog_name="kvcache", standalone_mode=False)
    except KVCacheError as error:
        print(f"kvcache: {one_line(error)}", file=sys.stderr)
        return 2
    except Wanting as error:
        print(f"kvcache: {one_line(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        if (said := usage(error)) is None:
            raise
        print(said, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return found if isinstance(found, int) else 0


def application() -> Any:
    """All commands, as a `typer.Typer`."""
    import typer

    app = typer.Typer(
        name="kvcache",
        help="Will it fit, where does it go, did it help: KV caches planned, profiled, tuned and looked after.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, place in _COMMANDS.items():
        module = import_module(place)
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name, context_settings=getattr(module, "SETTINGS", None))(module.command)
    return app
