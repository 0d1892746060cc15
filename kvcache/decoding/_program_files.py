"""Compiled programs as files: machine code that later processes run, so only what this user wrote in private is read.

A checksum in a file tells whether it is whole, not who wrote it: whoever can write the file can write the checksum. What is
trusted is the system's word that the folder and the file belong to this user and that nobody else may write to them.
"""

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvcache.errors import CorruptError
from kvcache.io import is_regular, make_private_folder, opened_regular, write_private
from kvcache.prefixes.stores import default_folder

FOLDER = "programs"
_SUFFIX = ".kvcache-program"
_MAGIC = b"kvcache program 1\n"
_LARGEST = 2**28  # bytes of one: those of the largest models take some megabytes, as weights are none of theirs
_ALL = 2**30  # bytes of all
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class ProgramFiles:
    """A private folder of compiled programs. Deleting it, or any file of it, is always safe.

    Args:
        folder: by default ``programs`` in `default_folder`; made when first written to.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._given = None if folder is None else Path(folder)

    @property
    def folder(self) -> Path:
        """Where they are.

        Raises:
            InputError: if none was given, and the user has no home.
        """
        return default_folder() / FOLDER if self._given is None else self._given

    def unsupported_reason(self) -> str | None:
        """Why nothing is read from the folder, nor written to it; None if it is private, or not there yet."""
        if not hasattr(os, "geteuid"):
            return "this system does not tell whose a file is"
        try:
            found = os.lstat(self.folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.folder} cannot be looked at: {error.strerror}"
        if not stat.S_ISDIR(found.st_mode):
            return f"{self.folder} is no folder; remove it"
        return _not_private(found, f"the folder {self.folder}")

    def read(self, key: str, made_by: dict[str, str]) -> tuple[dict[str, Any], bytes] | None:
        """What was written under a key, and the program's own bytes; None if there is nothing.

        Args:
            key: a digest, in hex.
            made_by: what it must have been made by: versions and the processor.

        Raises:
            CorruptError: with the reason why it is not used: it is another's, others may write to it, it is not whole, or of
                other versions.
        """
        if (reason := self.unsupported_reason()) is not None:
            raise CorruptError(reason)
        path = self._path(key)
        try:
            with opened_regular(path, _LARGEST) as (file, size):
                if (reason := _not_private(os.fstat(file.fileno()), "it")) is not None:  # of what was opened
                    raise CorruptError(reason)
                data = file.read(size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CorruptError(f"it cannot be read: {error.strerror}") from error
        about, program = _parted(data)
        if about["key"] != key:
            raise CorruptError("it is of another program; remove it")
        for name in sorted(made_by.keys() | about["made_by"].keys()):
            if (then := about["made_by"].get(name)) != (now := made_by.get(name)):
                raise CorruptError(f"it was made by {name} {then}, and this is {now}; it is made anew")
        with suppress(OSError):
            os.utime(path)  # the least recently used leave first
        return about["about"], program

    def write(self, key: str, made_by: dict[str, str], about: dict[str, Any], program: bytes) -> None:
        """Keep a program, whole or not at all, for this user alone; those that were not used for longest leave.

        Raises:
            CorruptError: with the reason, if the folder is not private.
            OSError: if it cannot be written.
        """
        make_private_folder(self.folder)
        if (reason := self.unsupported_reason()) is not None:
            raise CorruptError(reason)
        said = json.dumps({"key": key, "made_by": made_by, "about": about}).encode()
        body = len(said).to_bytes(8, "big") + said + program
        write_private(self._path(key), _MAGIC + hashlib.sha256(body).digest() + body)
        self._prune()

    def held(self) -> list[tuple[Path, int]]:
        """The files that are there, the least recently used first, and their bytes."""
        try:
            paths = [path for path in self.folder.iterdir() if path.suffix == _SUFFIX and is_regular(path)]
        except OSError:
            return []
        found = []
        for path in paths:
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
        return [(path, size) for _, path, size in sorted(found)]

    def _prune(self) -> None:
        held = self.held()
        over = sum(size for _, size in held) - _ALL
        for path, size in held:
            if over <= 0:
                return
            path.unlink(missing_ok=True)
            over -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def _parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What a file says about its program, and the program.

    Raises:
        CorruptError: if it is no such file, or not whole.
    """
    begin = len(_MAGIC)
    if data[:begin] != _MAGIC:
        raise CorruptError("it is no compiled program of this release; remove it")
    digest, body = data[begin : begin + 32], data[begin + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise CorruptError("it is not whole; remove it")
    length = int.from_bytes(body[:8], "big")
    try:
        about = json.loads(body[8 : 8 + length])
        if not isinstance(about["key"], str) or not isinstance(about["about"], dict):
            raise TypeError
        return {**about, "made_by": dict(about["made_by"])}, body[8 + length :]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError("it does not say what it is; remove it") from error


def _not_private(status: os.stat_result, what: str) -> str | None:
    """Why this is not trusted; None if it is this user's, and nobody else may write to it."""
    if status.st_uid != os.geteuid():
        return (
            f"{what} belongs to user {status.st_uid}, and this process runs as {os.geteuid()}; only its own code is run"
        )
    if status.st_mode & _OTHERS_WRITE:
        return f"{what} can be written to by others (mode {stat.S_IMODE(status.st_mode):o}); take that away with chmod go-w"
    return None


def why_not_private(folder: Path) -> str | None:
    """Why another's hand may be in a folder; None if it is this user's alone to write to, or not there."""
    try:
        return _not_private(os.stat(folder), f"the folder {folder}")
    except FileNotFoundError:
        return None
