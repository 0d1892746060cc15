"""Looking after a store: what is in it, whether it is intact, what may leave; what `kvcache prefixes` does.

Unlike in a request, a store that is down is an error here, `StoreError`.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcache.cache import Beginning, beginning, beginning_length
from kvcache.errors import CorruptError, InputError, SignatureError, said
from kvcache.io import shown_url
from kvcache.prefixes._snapshot import FORMAT, check_build_seconds
from kvcache.prefixes.stores._base import BlobStore, StoreEntry
from kvcache.prefixes.stores._disk import DiskStore, default_folder
from kvcache.prefixes.stores._redis import RedisStore
from kvcache.prefixes.stores._remote import RemoteStore

_REDIS = ("redis://", "rediss://", "unix://")
_FIRST_READ = 2**15  # bytes: the headers of most snapshots in one go
_HEX = re.compile(r"[0-9a-f]+")


def open_store(where: str | None = None, *, secret: bytes | None = None, namespace: str | None = None) -> BlobStore:
    """The store at a place, without a limit of its own: opening it to look after it drives nothing out.

    Args:
        where: a folder; ``redis://``, ``rediss://`` or ``unix://`` for a Redis server; any other URL goes to fsspec. None is
            the disk store in the user's cache, see `default_folder`.
        secret: that its snapshots are signed with; by default ``$KVCACHE_STORE_KEY``.
        namespace: of a Redis store.

    Raises:
        InputError: for a place that cannot be a store, or without the package that it needs.
    """
    where = where or None
    if where is not None and where.startswith(_REDIS):
        if namespace is None:
            return RedisStore(where, secret=secret)
        return RedisStore(where, secret=secret, namespace=namespace)
    if namespace is not None:
        raise InputError(f"a namespace is Redis' ({namespace!r} was given); leave it out, or give a redis:// store")
    if where is not None and "://" in where:
        return RemoteStore(where, secret=secret)
    folder = default_folder() if where is None else _expanded(where)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{shown_url(str(folder))} is a file; give the folder that the store is in")
    return DiskStore(folder, None, secret)


def shown_place(where: str | None) -> str:
    """The place of a store as it may be printed: without a password, a token or a query."""
    if not where:
        return str(default_folder())
    return shown_url(where) if "://" in where else shown_url(str(_expanded(where)))


def _expanded(where: str) -> Path:
    try:
        return Path(where).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{shown_url(where)!r} begins with the home of a user who has none; give a whole path"
        ) from error


@dataclass(frozen=True)
class Described:
    """What the beginning of a prefix's file says; see `Beginning`: nothing of it has been checked.

    Attributes:
        model: fingerprint.
        content: ``"token ids"`` or ``"embeddings"``.
        tokens: of the prefix.
        layers, kv_heads, head_dim: of its keys; 0 where there are none, but other tensors.
        dtype: of keys and values, or of the first of those, as safetensors names it.
        build_seconds: what it took to compute.
        signed: whether it says that it was written with a secret.
    """

    model: str
    content: str
    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    build_seconds: float
    signed: bool


def describe(store: BlobStore, address: str) -> Described | None:
    """What is at an address, from its first bytes; None if nothing is.

    Raises:
        CorruptError: if it is no prefix of this version.
        StoreError: if the store is down.
    """
    data = store.peek(address, _FIRST_READ)
    if data is not None and (needed := beginning_length(data)) > len(data) == _FIRST_READ:
        data = store.peek(address, needed)
    return None if data is None else described(beginning(data))


def described(found: Beginning, *, inside: str = "") -> Described:
    """What a file says of the prefix that it is, or that it carries.

    Args:
        found: of the file.
        inside: what the names of the prefix's tensors begin with, as ``"prefix."`` in the file of a voice.

    Raises:
        CorruptError: if it is no prefix of this version.
    """
    header: Any = found.header.get(inside.rstrip(".")) if inside else found.header
    try:
        if (header["format"], header["version"]) != ("kvcache-prefix", FORMAT):
            raise CorruptError(
                f"a {header['format']!r} of version {header['version']!r}; this is version {FORMAT} of 'kvcache-prefix'"
            )
        content, (tokens, *_) = (entry := found.tensors[f"{inside}content"]), entry[1]
        states = found.tensors.get(f"{inside}keys.0")
        if states is None and header["layers"] == 0:
            extra = next(tensor for name, tensor in found.tensors.items() if name.startswith(f"{inside}extra."))
            states = extra[0], (0, tokens, 0)
        if states is None:
            raise ValueError("no keys")
        dtype, (heads, tokens, dim) = states
        kind = "token ids" if len(content[1]) == 1 else "embeddings"
        layers, seconds, model = header["layers"], header["build_seconds"], header["model"]
        check_build_seconds(seconds)
        if type(layers) is not int or type(model) is not str:
            raise ValueError(f"{layers!r:.40} layers of a model {model!r:.40}")
        model.encode()  # what UTF-8 cannot write is no fingerprint
        return Described(model, kind, tokens, layers, heads, dim, dtype, seconds, found.signed)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"the parts of a prefix do not fit together: {said(error)}") from error


def find(entries: Iterable[StoreEntry], begins: str) -> StoreEntry:
    """The one whose address begins so.

    Raises:
        InputError: if there is none, or more than one.
    """
    if _HEX.fullmatch(begins) is None:
        raise InputError(
            f"{begins!r} is no address; give the first hex digits of one, as the list of the store has them"
        )
    found = [entry for entry in entries if entry.address.startswith(begins)]
    if not found:
        raise InputError(f"no prefix there has an address that begins with {begins}; give one that the list has")
    if len(found) > 1:
        two = " and ".join(sorted(entry.address for entry in found)[i][: len(begins) + 8] for i in (0, 1))
        raise InputError(f"{len(found)} addresses begin with {begins}, such as {two}; give more digits")
    return found[0]


@dataclass(frozen=True)
class Checked:
    """What became of a check.

    Attributes:
        entry: that was read.
        problem: None if it is intact.
        foreign: whether the problem is its signature: another secret, or none. Then it may well be intact.
    """

    entry: StoreEntry
    problem: str | None
    foreign: bool = False


def verify(store: BlobStore, entries: Iterable[StoreEntry]) -> Iterator[Checked]:
    """Read each of these and compare it with what it says: every byte, its version, its content and its address.

    One that has been removed meanwhile is passed over.

    Raises:
        StoreError: if the store is down.
    """
    for entry in entries:
        try:
            if store.read_verified(entry.address) is not None:
                yield Checked(entry, None)
        except CorruptError as error:
            yield Checked(entry, str(error), isinstance(error, SignatureError))


def prunable(
    store: BlobStore,
    entries: Sequence[StoreEntry],
    *,
    max_bytes: int | None = None,
    older_than: float | None = None,
    model: str | None = None,
    pinned: bool = False,
    now: float | None = None,
) -> list[StoreEntry]:
    """Which of these have to leave, the least recently used first.

    Args:
        store: that they are in.
        entries: all of the store's.
        max_bytes: as many leave as it takes until no more is held, or until none is left that may; None: all that may.
        older_than: only those may leave that were not used for so many seconds; of one whose time is unknown that is not
            known.
        model: only those of a model whose fingerprint begins so; of what cannot be read no model is known.
        pinned: whether pinned ones may leave too.
        now: seconds since 1970; None for the clock.

    Raises:
        InputError: if none of the three is given, or `model` is empty or begins the fingerprints of several.
        StoreError: if the store is down.
    """
    if max_bytes is None and older_than is None and model is None:
        raise InputError("nothing says what is to leave; give max_bytes, older_than or model")
    if model == "":
        raise InputError(
            "model='' begins every fingerprint; give the first digits of one, as the list of the store has them"
        )
    before = None if older_than is None else (time.time() if now is None else now) - older_than
    may = [entry for entry in entries if pinned or not entry.pinned]
    if before is not None:
        may = [entry for entry in may if entry.used is not None and entry.used < before]
    if model is not None:
        theirs = _of_model(store, entries, model)
        may = [entry for entry in may if entry.address in theirs]
    may.sort(key=lambda entry: entry.used or 0.0)
    if max_bytes is None:
        return may
    left, leaving = sum(entry.nbytes for entry in entries), []
    for entry in may:
        if left <= max_bytes:
            break
        leaving.append(entry)
        left -= entry.nbytes
    return leaving


def _of_model(store: BlobStore, entries: Iterable[StoreEntry], begins: str) -> set[str]:
    """Addresses of what is of the model whose fingerprint begins so."""
    models: dict[str, set[str]] = {}
    for entry in entries:
        try:
            found = describe(store, entry.address)
        except CorruptError:
            continue
        if found is not None and found.model.startswith(begins):
            models.setdefault(found.model, set()).add(entry.address)
    if len(models) > 1:
        several = " and ".join(sorted(model[:16] for model in models)[:2])
        raise InputError(f"several models' fingerprints begin with {begins}, such as {several}; give more of it")
    return next(iter(models.values()), set())
