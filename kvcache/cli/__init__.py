"""The command `kvcache`: plan, profile, tune, warm, prefixes, doctor. A file for each, and `_common` for what they share."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Annotated, Any

import kvcache
from kvcache.errors import InputError, KVCacheError, said
from kvcache.io import printable

_COMMANDS = {  # each in the module of its name; what it is for stands here too, as the list of all shall import none of them
    "doctor": "What works here and why something does not: packages, devices, precisions, back ends, stores.",
    "plan": "Say what serving a model takes, before it is loaded: weights, KV cache, workspace, and what fits.",
    "profile": "Decode a little and say where time and memory go: attention, MLP, cache, sampling, host; weights, KV, the rest.",
    "tune": "Find the fastest way to decode a model on this machine, say why, and save it for from_profile().",
    "warm": "Compile a model's steps for backend='compile' on a CPU, and its vocoder's, before anybody waits for them.",
    "prefixes": "Prompts and voices that a store holds: list, check, copy, pin and remove them.",
}
_VERSION = f"kvcache {kvcache.__version__}"
_INTERRUPTED = 128 + signal.SIGINT  # as a shell has it
_LONGEST = 900  # characters of a line
_PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows has not


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 if what was asked for was found wanting, 2 for a wrong request.

    A wrong request says in one line what is wrong and what to do, on standard error. Two codes are a shell's: 130 when it was
    interrupted, 141 when whoever read standard output closed it. With ``$KVCACHE_TRACEBACK`` set, what nobody expected is
    raised and not said.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with _readable(sys.stdout), _readable(sys.stderr):
        try:
            code = _ended(lambda: _run(given))
            if sys.stdout is not None:
                sys.stdout.flush()
        except KeyboardInterrupt:
            return _INTERRUPTED
        except OSError as error:
            if not _is_output(error):
                raise
            return _unwritten(error)
        return code


def _run(arguments: list[str]) -> Any:
    if arguments == ["--version"]:  # answered where typer is missing, too
        print(_VERSION)
        return 0
    with _leaving_at_once():
        try:
            import typer  # noqa: F401
        except ImportError:
            raise InputError('the command needs typer and rich; run: pip install "kvcache[cli]"') from None
        first = next((word for word in arguments if word != "--"), None)
        app = application([first]) if first in _COMMANDS else overview()
    return app(arguments, prog_name="kvcache", standalone_mode=False)


def _ended(run: Callable[[], Any]) -> int:
    """The exit code of what was run, and one line about what ended it."""
    try:
        found = run()
    except KVCacheError as error:
        return _say(error, 2)
    except ImportError as error:
        return _say(f"{said(error)}; install what is missing, and see kvcache doctor", 2)
    except Exception as error:
        from kvcache.cli._common import CheckFailed, usage

        if isinstance(error, CheckFailed):
            return _say(error, 1)
        if type(error).__name__ == "Abort":  # click's, for an interrupt
            return _INTERRUPTED
        if (told := usage(error)) is not None:
            return _say(told, 2, plain=True)
        if os.environ.get("KVCACHE_TRACEBACK") or (isinstance(error, OSError) and _is_output(error)):
            raise
        return _say(_unexpected(error), 2)
    except SystemExit:  # click's, when whoever read standard output has closed it
        return _PIPE_CLOSED
    return found if isinstance(found, int) else 0


def _is_output(error: OSError) -> bool:
    """Whether it is of writing to what is open already: of no file by name, and for lack of room or of a reader."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EINVAL)


def _unwritten(error: OSError) -> int:
    """The exit code where standard output takes no more."""
    if error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
        return _PIPE_CLOSED
    return _say(f"standard output cannot be written: {error.strerror}; make room, or write elsewhere", 1)


def _unexpected(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, MemoryError) or "alloc" in lines[0] or "out of memory" in lines[0]:
        return f"there is not enough memory for it ({lines[0]}); give less, and see kvcache plan"
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{str(error.filename)[:100]}: "
        return f"{where}{error.strerror or error}; check that this may be read and written"
    return f"{type(error).__name__}: {lines[0]}; check what was given, or set KVCACHE_TRACEBACK=1 to see where that comes from"


def _say(line: object, code: int = 2, *, plain: bool = False) -> int:
    """One line on standard error, as far as that can be written; the code."""
    text = str(line) if plain else "kvcache: " + printable(" ".join(str(line).split()))
    if len(text) > _LONGEST and "\n" not in text:  # what was given is in it
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 3 :]}"
    with suppress(OSError, ValueError):  # there is nowhere left to say it
        print(text, file=sys.stderr, flush=True)
    return code


@contextmanager
def _readable(stream: Any) -> Iterator[None]:
    """A stream that writes a question mark where its encoding has no such character."""
    configure, before = getattr(stream, "reconfigure", None), getattr(stream, "errors", None)
    if configure is None or before is None:
        yield
        return
    configure(errors="replace")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # it flushes
            configure(errors=before)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Within this block an interrupt ends the process.

    It only imports: there is nothing to clean up, and not every package that is imported lets an interrupt through.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def application(names: Iterable[str] = _COMMANDS) -> Any:
    """These commands, all by default, as a `typer.Typer`; only what they need is imported."""
    app = _group()
    for name in names:
        module = import_module(f"{__name__}._{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name, context_settings=getattr(module, "SETTINGS", None))(module.command)
    return app


def overview() -> Any:
    """All commands by name and by what they are for, as a `typer.Typer` that runs none of them: nothing heavy is imported."""
    app = _group()
    for name, about in _COMMANDS.items():
        app.command(name, help=about)(lambda: None)
    return app


def _group() -> Any:
    import typer

    app = typer.Typer(name="kvcache", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def say_version(asked: bool) -> None:
        if asked:
            print(_VERSION)
            raise typer.Exit

    option = typer.Option("--version", is_eager=True, callback=say_version, help="Print the version and exit.")

    @app.callback(help="Plan, profile, tune and look after KV caches.")
    def group(_version: Annotated[bool, option] = False) -> None:
        """Of commands, however few there are."""

    return app
