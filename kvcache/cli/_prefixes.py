"""`kvcache prefixes`: what a store holds, of any model, and looking after it."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from kvcache.cache import beginning, unpack
from kvcache.cli._common import CheckFailed, Json, bytes_of, display, one_line, print_json, progress, shown_bytes, table
from kvcache.errors import CorruptError, InputError, KVCacheError, SignatureError, StoreError
from kvcache.io import check_given, read_given, write_given
from kvcache.prefixes.stores import (
    BlobStore,
    Described,
    DiskStore,
    StoreEntry,
    describe,
    described,
    find,
    open_store,
    prunable,
    shown_place,
    store_secret,
    verify,
)

app = typer.Typer(
    help="Prompts and voices that a store holds: list, check, copy, pin and remove them.", no_args_is_help=True
)

Where = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="KVCACHE_STORE",
        metavar="PLACE",
        help="A folder, redis://host, or what fsspec reaches (s3://bucket/voices). By default the disk store in the user's "
        "cache. A URL with a password belongs into $KVCACHE_STORE, not here.",
    ),
]
Namespace = Annotated[str | None, typer.Option(metavar="NAME", help="Of a Redis store; by default kvcache.")]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Holds the secret that the store's files are signed with; line ends are cut off. By default "
        "$KVCACHE_STORE_KEY, if it is set.",
    ),
]
Address = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="Of a prefix, or its first digits.", show_default=False)
]

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@app.command("list")
def show_all(
    store: Where = None, namespace: Namespace = None, secret_file: SecretFile = None, as_json: Json = False
) -> None:
    """What a store holds, the last used first."""
    with _opened(store, namespace, secret_file) as opened:
        entries = sorted(opened.entries(), key=lambda entry: entry.used or 0.0, reverse=True)
        rows = [_row(opened, entry) for entry in entries]
    held = sum(entry.nbytes for entry in entries)
    if as_json:
        print_json({"store": shown_place(store), "nbytes": held, "prefixes": rows})
        return
    title = f"{shown_place(store)}: {_counted(len(rows))}, {shown_bytes(held)}"
    shown = table(
        title, "address", "of", "dtype", "model", "tokens", "layers", "heads", "bytes", "last used", "pinned", right=4
    )
    for row in rows:
        if row["problem"] is None:
            what = (row["content"], row["dtype"], row["model"][:8], row["tokens"], row["layers"], row["kv_heads"])
        else:
            what = ("unreadable", "–", "–", "–", "–", "–")
        more = (shown_bytes(row["nbytes"]), _ago(row["used"]), "yes" if row["pinned"] else "")
        shown.add_row(row["address"][:16], *map(str, what), *more)
    display(shown if rows else title)
    _problems(rows)


@app.command()
def show(
    what: Annotated[
        str, typer.Argument(metavar="ADDRESS|FILE", help="A prefix in the store, or any file of kvcache's.")
    ],
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """All there is to say about one prefix, or about a file: an exported prefix, a voice, a saved cache."""
    if re.fullmatch(r"[0-9a-f]+", what) is None:
        said = _file(Path(what), read_secret(secret_file))
    else:
        with _opened(store, namespace, secret_file) as opened:
            said = _row(opened, find(opened.entries(), what))
    if as_json:
        print_json(said)
    else:
        for name, value in said.items():
            display(f"{name.replace('_', ' '):14} {_shown(name, value)}")
    if said.get("problem") is not None:
        raise CheckFailed(said["problem"])


@app.command("verify")
def check(
    address: Annotated[
        str | None, typer.Argument(metavar="[ADDRESS]", help="Of one prefix, or its first digits; by default all.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is corrupt, pinned or not.")] = False,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Read the files of a store and check every byte; exit code 1 if one of them is corrupt, signed otherwise or unreadable."""
    bad: list[dict[str, Any]] = []
    with _opened(store, namespace, secret_file) as opened:
        entries = opened.entries()
        entries = entries if address is None else [find(entries, address)]
        screen = progress()
        for checked in track(
            verify(opened, entries), "reading", len(entries), console=screen, disable=not screen.is_terminal
        ):
            if checked.problem is None:
                continue
            stuck = _removed(opened, checked.entry) if remove and not checked.foreign else None
            gone = remove and not checked.foreign and stuck is None
            problem = checked.problem if stuck is None else f"{checked.problem}; {stuck}"
            bad.append({"address": checked.entry.address, "problem": problem, "removed": gone})
    if as_json:
        print_json({"store": shown_place(store), "checked": len(entries), "bad": bad})
    else:
        display(f"{shown_place(store)}: {_counted(len(entries))} read, {len(entries) - len(bad)} intact")
        _problems(bad)
    if bad:
        left = sum(not row["removed"] for row in bad)
        todo = "what was removed is computed again when it is asked for"
        if left:
            todo = f"run kvcache prefixes verify --remove, or give the right --secret-file: {left} still there"
        raise CheckFailed(f"{len(bad)} of {_counted(len(entries))} cannot be used; {todo}")


@app.command()
def export(
    address: Address,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Copy a prefix out of a store into a file, after it was checked; it stays signed as it is."""
    if file.exists() and not force:
        raise InputError(f"{file} exists; give another name, or --force to replace it")
    check_given(file)
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent}; make it, or give another")
    with _opened(store, namespace, secret_file) as opened:
        found = find(opened.entries(), address).address
        data = opened.read_verified(found)
    if data is None:
        raise CheckFailed(f"{found} left the store meanwhile; run kvcache prefixes list")
    try:
        write_given(file, data)
    except OSError as error:
        raise CheckFailed(f"{file} could not be written: {error}; give another place") from error
    _done(as_json, {"address": found, "file": str(file), "nbytes": len(data)}, f"{found} is in {file}")


@app.command("import")
def bring_in(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That export wrote.")],
    pin: Annotated[bool, typer.Option("--pin", help="Keep it there until it is removed.")] = False,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Copy a prefix from a file into a store. Refused is what is not intact, or not signed with the store's secret."""
    data = _read(file)
    try:
        described(beginning(data))
    except CorruptError as error:
        raise InputError(f"{file}: {error}; give a file that kvcache prefixes export wrote") from error
    with _opened(store, namespace, secret_file, new=True) as opened:
        try:
            address = opened.add(data)
        except CorruptError as error:
            raise type(error)(f"{file} is not taken in: {error}") from error
        if pin:
            opened.pin_address(address)
    _done(as_json, {"address": address, "nbytes": len(data), "pinned": pin}, f"{address} is in {shown_place(store)}")


@app.command()
def prune(
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Until it holds no more, as in 2GiB.")] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="What was not used for so long, as in 30d.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="What this model computed; its first digits.")
    ] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Also what is pinned.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would leave, and remove nothing.")] = False,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Remove what is old, too much or of one model, the least recently used first; what is pinned only with --pinned.

    --older-than and --model say what may leave; --max-bytes how much of that has to.
    """
    limit, age = bytes_of("--max-bytes", max_bytes), _age_of("--older-than", older_than)
    if limit is None and age is None and model is None:
        raise InputError("nothing says what is to leave; give --max-bytes, --older-than or --model")
    with _opened(store, namespace, secret_file) as opened:
        entries = opened.entries()
        leaving = prunable(opened, entries, max_bytes=limit, older_than=age, model=model, pinned=pinned)
        stuck = {} if dry_run else {entry.address: _removed(opened, entry) for entry in leaving}
    failed = [{"address": address, "problem": why} for address, why in stuck.items() if why is not None]
    leaving = [entry for entry in leaving if stuck.get(entry.address) is None]
    freed = sum(entry.nbytes for entry in leaving)
    left = sum(entry.nbytes for entry in entries) - freed
    if as_json:
        answer = {"store": shown_place(store), "dry_run": dry_run, "removed": [asdict(entry) for entry in leaving]}
        print_json(answer | {"freed": freed, "nbytes": left, "failed": failed})
    else:
        did = "would be removed" if dry_run else "removed"
        for entry in leaving:
            display(f"{entry.address} {did}: {shown_bytes(entry.nbytes)}, last used {_ago(entry.used)}")
        display(f"{_counted(len(leaving))}, {shown_bytes(freed)} {did}; {shown_bytes(left)} stay")
        _problems(failed)
    if failed:
        raise CheckFailed(f"{_counted(len(failed))} could not be removed; see that the store may be written")
    if limit is not None and left > limit:
        raise CheckFailed(
            f"{shown_bytes(left)} stay, more than --max-bytes {max_bytes}: the rest is pinned, or not what was asked for; "
            "give --pinned, or leave out --older-than and --model"
        )


@app.command("remove")
def forget(
    address: Address,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Remove one prefix, pinned or not."""
    with _opened(store, namespace, secret_file) as opened:
        found = find(opened.entries(), address).address
        opened.remove(found)
    _done(as_json, {"address": found, "removed": True}, f"{found} removed")


@app.command()
def pin(
    address: Address,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Keep a prefix until it is removed: no budget and no time drives it out."""
    _hold(address, True, store, namespace, secret_file, as_json)


@app.command()
def unpin(
    address: Address,
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    as_json: Json = False,
) -> None:
    """Let a prefix leave again as any other."""
    _hold(address, False, store, namespace, secret_file, as_json)


def _hold(
    address: str, pinned: bool, store: str | None, namespace: str | None, secret_file: Path | None, as_json: bool
) -> None:
    with _opened(store, namespace, secret_file) as opened:
        found = find(opened.entries(), address).address
        opened.pin_address(found, pinned)
    _done(as_json, {"address": found, "pinned": pinned}, f"{found} is {'' if pinned else 'no longer '}pinned")


# ---------------------------------------------------------------------- shared


@contextmanager
def _opened(
    where: str | None, namespace: str | None, secret_file: Path | None, *, new: bool = False
) -> Iterator[BlobStore]:
    """The store; its being down, and a file in it that is not intact, end the command with exit code 1."""
    opened = open_store(where, secret=read_secret(secret_file), namespace=namespace)
    if where and isinstance(opened, DiskStore) and not new and not opened.folder.is_dir():
        raise InputError(f"there is no folder {shown_place(where)}; give one that a store is in")
    with opened:
        try:
            yield opened
        except (StoreError, CorruptError) as error:
            hint = ", with --secret-file" if isinstance(error, SignatureError) else ""
            raise CheckFailed(f"{shown_place(where)}: {error}{hint}") from error


def read_secret(file: Path | None) -> bytes | None:
    if file is None:
        return None
    secret = _read(file).rstrip(b"\r\n")
    if not secret:
        raise InputError(f"{file} is empty; give the file that holds the secret")
    return secret


def _read(file: Path) -> bytes:
    try:
        return read_given(file)
    except (OSError, CorruptError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
        raise InputError(f"{file} cannot be read: {reason}; give a file that can be") from error


def _row(store: BlobStore, entry: StoreEntry) -> dict[str, Any]:
    """An entry and what its file says of itself."""
    told: Described | None = None
    try:
        told = describe(store, entry.address)
        problem = "it has left the store" if told is None else None
    except KVCacheError as error:
        problem = str(error)
    except Exception as error:  # what a stranger may have written there has no end, and is no other entry's problem
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    fields = dict.fromkeys(Described.__dataclass_fields__) if told is None else asdict(told)
    return {
        "address": entry.address,
        **fields,
        **{k: v for k, v in asdict(entry).items() if k != "address"},
        "problem": problem,
    }


def _removed(store: BlobStore, entry: StoreEntry) -> str | None:
    """Remove an entry; why it is still there, if it is."""
    try:
        store.remove(entry.address)
    except StoreError as error:
        return one_line(error)
    return None


def _problems(rows: Iterable[Mapping[str, Any]]) -> None:
    """A line for each that has one."""
    for row in rows:
        if row["problem"] is not None:
            display(f"{row['address']}: {row['problem']}{'; removed' if row.get('removed') else ''}")


def _file(file: Path, secret: bytes | None) -> dict[str, Any]:
    """What a file of kvcache's says of itself, and whether that can be believed."""
    data = _read(file)
    try:
        found = beginning(data)
    except CorruptError as error:
        raise InputError(f"{file}: {error}") from error
    header = found.header
    said: dict[str, Any] = {"file": str(file), "format": header.get("format"), "version": header.get("version")}
    if isinstance(header.get("name"), str):
        said["name"] = header["name"]
    said |= {"nbytes": len(data), "tensors": len(found.tensors), "signed": found.signed}
    inside = "prefix." if isinstance(header.get("prefix"), dict) else ""
    problem = None
    try:
        unpack(data, store_secret(secret))
        if inside or header.get("format") == "kvcache-prefix":
            said |= asdict(described(found, inside=inside))
    except CorruptError as error:
        problem = str(error)
    except Exception as error:  # what a stranger may have written there has no end
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    return said | {"problem": problem}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name == "nbytes":
        return f"{shown_bytes(value)} ({value} bytes)"
    if name == "used":
        return _ago(value)
    if name == "build_seconds":
        return f"{value:.3g} s"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _done(as_json: bool, answer: dict[str, Any], said: str) -> None:
    if as_json:
        print_json(answer)
    else:
        display(said)


def _counted(count: int) -> str:
    return f"{count} prefix" if count == 1 else f"{count} prefixes"


def _ago(used: float | None) -> str:
    """How long ago that was: ``3 min ago``."""
    if used is None:
        return "unknown"
    seconds = max(0.0, time.time() - used)
    unit = next((unit for unit in ("d", "h", "min") if seconds >= 2 * _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.0f} {unit} ago"


def _age_of(option: str, given: str | None) -> float | None:
    """Seconds of ``30d``, ``12h``, ``90min``, ``2w`` or ``10s``."""
    if given is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|d|w)", given.strip())
    if match is None:
        raise InputError(f"{option} {given!r} is no time; give a number and s, min, h, d or w, as in 30d")
    return float(match[1]) * _SECONDS[match[2]]
