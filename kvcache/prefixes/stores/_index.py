"""What the files of a folder say, in SQLite, so that a write asks for what it needs to know and lists nothing.

The index is a cache. The files are the truth: an index that is missing, of another version, broken, locked by a stranger or
older than the folder costs one listing of the folder, never an answer.
"""

import os
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.io import is_regular, make_private_file, set_aside
from kvcache.prefixes._snapshot import is_address

_VERSION = 1
_WAIT = 0.05  # seconds for a stranger who reads it just now
_NAME = "index.sqlite"
_BESIDE = ("", "-journal", "-wal", "-shm")  # what SQLite itself opens
_TABLES = (
    # used: nanoseconds since 1970; the file may have been used since. parent: address of the prefix that it continues; NULL if
    # there is none, or it is not known, as after a listing: the file's header says it.
    "CREATE TABLE entries (address TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, used INTEGER NOT NULL, "
    "pinned INTEGER NOT NULL, parent TEXT) WITHOUT ROWID",
    "CREATE INDEX by_use ON entries (pinned, used)",
    "CREATE INDEX by_size ON entries (nbytes)",
    "CREATE INDEX by_parent ON entries (parent) WHERE parent IS NOT NULL",
    # Sums are kept, not computed. folder: when the folder had last changed, in nanoseconds since 1970.
    "CREATE TABLE totals (count INTEGER NOT NULL, nbytes INTEGER NOT NULL, pinned INTEGER NOT NULL, folder INTEGER)",
    "INSERT INTO totals VALUES (0, 0, 0, NULL)",
    "CREATE TRIGGER added AFTER INSERT ON entries BEGIN UPDATE totals SET count = count + 1, "
    "nbytes = nbytes + new.nbytes, pinned = pinned + new.nbytes * new.pinned; END",
    "CREATE TRIGGER removed AFTER DELETE ON entries BEGIN UPDATE totals SET count = count - 1, "
    "nbytes = nbytes - old.nbytes, pinned = pinned - old.nbytes * old.pinned; END",
    "CREATE TRIGGER changed AFTER UPDATE ON entries BEGIN UPDATE totals SET nbytes = nbytes + new.nbytes - old.nbytes, "
    "pinned = pinned + new.nbytes * new.pinned - old.nbytes * old.pinned; END",
)
_SCHEMA = sorted(statement for statement in _TABLES if statement.startswith("CREATE"))
_SUMS = "UPDATE totals SET (count, nbytes, pinned) = (SELECT count(*), {}, {} FROM entries)".format(
    "coalesce(sum(nbytes), 0)", "coalesce(sum(nbytes * pinned), 0)"
)
_LAST = 2**63 - 1  # what SQLite can hold


@dataclass(frozen=True)
class Row:
    """What is known of one file.

    Attributes:
        nbytes: of it.
        used: when it was last used, in nanoseconds since 1970, as `nanoseconds` gives them.
        pinned: whether it stays.
        parent: address of the prefix that it continues, where that is known.
    """

    nbytes: int
    used: int
    pinned: bool
    parent: str | None = None


class Index:
    """One connection, for one turn of one thread, which ends with `commit` or with nothing.

    Args:
        folder: that the index lies in; None for one in memory.
        reading: only look, and make nothing.

    Raises:
        sqlite3.Error: if it cannot be used. So does every method.
        OSError: if it cannot be opened or made.
    """

    def __init__(self, folder: Path | None, reading: bool = False) -> None:
        where = ":memory:"
        if folder is not None:
            file = _cleared(folder, reading)
            where = f"{file.absolute().as_uri()}?mode={'ro' if reading else 'rw'}"
        self._db = sqlite3.connect(where, timeout=_WAIT, isolation_level=None, uri=folder is not None)
        try:
            self._begin(reading)
        except BaseException:
            self._db.close()
            raise

    def _begin(self, reading: bool) -> None:
        if reading:
            self._check_version()
            return
        self._db.execute("PRAGMA synchronous = OFF")  # what a power failure tears is listed again
        self._db.execute("PRAGMA temp_store = MEMORY")
        self._db.execute("PRAGMA page_size = 1024")  # of a new one: twelve kilobytes in all, where the disk is small
        self._db.execute("BEGIN IMMEDIATE")
        if self._version() == 0 and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in _TABLES:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
        self._check_version()

    def close(self) -> None:
        self._db.close()

    def commit(self, folder: int | None) -> None:
        """Keep what was noted, as what the folder says at this time of its last change; None if that is not known."""
        self._db.execute("UPDATE totals SET folder = ?", (folder,))
        self._db.execute("COMMIT")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _check_version(self) -> None:
        if (version := self._version()) != _VERSION:
            raise sqlite3.DatabaseError(f"an index of version {version}; this is {_VERSION}")
        made = self._db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if sorted(sql for (sql,) in made) != _SCHEMA:  # a trigger of somebody else's may do anything, or never end
            raise sqlite3.DatabaseError("an index with other tables or triggers than ours")

    # ------------------------------------------------------------------ what it says

    @property
    def folder(self) -> int | None:
        """When the folder had last changed, in nanoseconds since 1970."""
        return self._total("folder")

    @property
    def count(self) -> int:
        return _whole(self._total("count"))

    @property
    def nbytes(self) -> int:
        return _whole(self._total("nbytes"))

    def pinned(self, but: str, largest: int) -> int:
        """Bytes that stay, but for one address and for what is too large to belong here."""
        others = "SELECT coalesce(sum(nbytes), 0) FROM entries WHERE pinned AND"
        mine = self._db.execute(f"{others} address = ? AND nbytes <= ?", (but, largest)).fetchone()[0]
        strange = self._db.execute(f"{others} nbytes > ?", (largest,)).fetchone()[0]
        return _whole(self._total("pinned")) - _whole(mine) - _whole(strange)

    def _total(self, name: str) -> int | None:
        found = self._db.execute(f"SELECT {name} FROM totals").fetchall()
        if len(found) != 1 or not isinstance(found[0][0], (int, type(None))):
            raise sqlite3.DatabaseError("the sums of the index are not there")
        total: int | None = found[0][0]
        return total

    def row(self, address: str) -> Row | None:
        """What is known of one."""
        found = self._db.execute(
            "SELECT nbytes, used, pinned, parent FROM entries WHERE address = ?", (address,)
        ).fetchone()
        return None if found is None else Row(found[0], found[1], bool(found[2]), found[3])

    def next_to_leave(self, largest: int, but: Collection[str]) -> str | None:
        """The address that leaves first: what is too large to belong here, then the least recently used.

        Args:
            largest: bytes of what may belong here.
            but: addresses to pass over.
        """
        marks = ", ".join("?" * len(but))
        for which, order in (("nbytes > ?", "nbytes DESC"), ("pinned = 0 AND nbytes <= ?", "used")):
            found = self._db.execute(
                f"SELECT address FROM entries WHERE {which} AND address NOT IN ({marks}) ORDER BY {order} LIMIT 1",
                (largest, *but),
            ).fetchone()
            if found is not None:
                if not is_address(found[0]):
                    raise sqlite3.DatabaseError("what the index lists is no address")
                return str(found[0])
        return None

    # ------------------------------------------------------------------ what it is told

    def note(self, address: str, row: Row) -> None:
        """What is known of one from now on; a parent that is not known stays as it was."""
        self._db.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?) ON CONFLICT (address) DO UPDATE SET nbytes = excluded.nbytes, "
            "used = excluded.used, pinned = excluded.pinned, parent = coalesce(excluded.parent, parent)",
            (address, row.nbytes, row.used, int(row.pinned), row.parent),
        )

    def forget(self, address: str) -> None:
        self._db.execute("DELETE FROM entries WHERE address = ?", (address,))

    def match(self, found: Mapping[str, Row]) -> None:
        """Say what a listing of the folder says, and nothing else."""
        rows = self._db.execute("SELECT address, nbytes, used, pinned FROM entries").fetchall()
        known = {address: (nbytes, used, pinned) for address, nbytes, used, pinned in rows}
        for address in known.keys() - found.keys():
            self.forget(address)
        for address, row in found.items():
            if known.get(address) != (row.nbytes, row.used, int(row.pinned)):
                self.note(address, row)
        self._db.execute(_SUMS)  # whatever they were before


def nanoseconds(time: int) -> int:
    """A file's time as the index can hold it: a file system may give any."""
    return max(-_LAST, min(time, _LAST))


def _whole(given: object) -> int:
    """What the index says of sizes, if it is one."""
    if not isinstance(given, int) or given < 0:
        raise sqlite3.DatabaseError("what the index says of sizes is no number of bytes")
    return given


def discard(folder: Path, error: Exception) -> None:
    """Remove an index that failed so, unless it may be sound: somebody holds it, or the disk is full."""
    if not any(word in str(error) for word in ("locked", "full", "readonly", "unable to open")):
        for end in _BESIDE:
            (folder / f"{_NAME}{end}").unlink(missing_ok=True)


def _cleared(folder: Path, reading: bool) -> Path:
    """The index's file, which is there, and nothing but files where SQLite opens one: it would wait for a FIFO."""
    for end in _BESIDE:
        path = folder / f"{_NAME}{end}"
        if os.path.lexists(path) and not is_regular(path):
            if reading:
                raise FileNotFoundError(path)
            set_aside(path)
    file = folder / _NAME
    if not reading and not file.exists():
        make_private_file(file)
    return file
