"""Tensors and a JSON header in one safetensors file whose every byte is covered by a checksum.

What comes from a disk or a network is checked before anything in it is used: first the checksum, then what it says. With
a secret the checksum is an HMAC, and what was not written by someone who knows the secret is refused.
"""

import hashlib
import hmac
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from kvcache.errors import CorruptError, SignatureError

_UNSET = "0" * 64
_PLACE = f'"checksum":"{_UNSET}"'.encode()  # nowhere else: quotes within the header are escaped
_LENGTH = 8  # a safetensors file begins with the length of its header, little-endian
_LONGEST_HEADER = 4 * 2**20
_CHUNK = 4 * 2**20


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], secret: bytes | None = None) -> bytes:
    """A safetensors file with these tensors, a header (JSON) and a checksum.

    Args:
        tensors: by name, of any shape, in dtypes that safetensors has.
        header: what goes with them.
        secret: what the file is signed with; None signs nothing.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"header": json.dumps(header, sort_keys=True), "checksum": _UNSET}
    if secret is not None:
        metadata["signed"] = _signer(secret)
    data = safetensors.torch.save(plain, metadata)
    at = data.index(_PLACE, _LENGTH) + _PLACE.index(_UNSET.encode())
    return b"".join((data[:at], _checksum(data, at, secret).encode(), data[at + len(_UNSET) :]))


def unpack(data: bytes, secret: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, of any shape, and the header of a file that `pack` wrote.

    Raises:
        CorruptError: if one byte is not as it was written; a `SignatureError` if the file was written with another secret.
    """
    try:
        raw, metadata, _ = _beginning(data)
        header, checksum = metadata["header"], metadata["checksum"]
        if len(checksum) != len(_UNSET) or raw.count(checksum.encode()) != 1:
            raise ValueError("no checksum in the header")
        at = _LENGTH + raw.index(checksum.encode())
        if not hmac.compare_digest(_checksum(data, at, secret).encode(), checksum.encode()):
            if (signer := metadata.get("signed")) != (None if secret is None else _signer(secret)):
                raise _unsigned(signer, secret)
            raise ValueError("the checksum is not that of the content")
        tensors, fields = safetensors.torch.load(data), json.loads(header)
        if not isinstance(fields, dict):
            raise ValueError("a header without fields")
    except SignatureError:
        raise
    except Exception as error:  # JSON, Unicode, missing or mistyped fields, safetensors' own: what is wrong is wrong
        raise CorruptError(f"not an intact file of kvcache's: {error}; it will not be used, write it again") from error
    return tensors, fields


@dataclass(frozen=True)
class Beginning:
    """What a file says of itself in its first bytes; nothing of it has been checked.

    Attributes:
        header: the JSON that was packed.
        tensors: dtype as safetensors names it, such as ``"BF16"``, and shape of each tensor.
        nbytes: of the whole file.
        signed: whether it says that it was written with a secret.
    """

    header: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    nbytes: int
    signed: bool


def beginning(data: bytes) -> Beginning:
    """What a file of `pack`'s says of itself, from its first bytes: as many as `beginning_length` says.

    Raises:
        CorruptError: if it is no such file.
    """
    try:
        raw, metadata, tensors = _beginning(data)
        found = {name: (str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in tensors.items()}
        end = max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)
        header = json.loads(metadata["header"])
        if not isinstance(header, dict):
            raise ValueError("a header without fields")
        return Beginning(header, found, _LENGTH + len(raw) + end, metadata.get("signed") is not None)
    except Exception as error:
        raise CorruptError(f"not a file of kvcache's: {error}; write it again") from error


def beginning_length(data: bytes) -> int:
    """How many first bytes of a file `beginning` needs, told by its first 8."""
    return _LENGTH + min(_LONGEST_HEADER, int.from_bytes(data[:_LENGTH], "little"))


def longest_beginning() -> int:
    """Bytes that `beginning_length` says at most."""
    return _LENGTH + _LONGEST_HEADER


def _beginning(data: bytes) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """The safetensors header of a file as it stands there, what of it is ours, and its tensors."""
    length = int.from_bytes(data[:_LENGTH], "little")
    if not 0 < length <= min(_LONGEST_HEADER, len(data) - _LENGTH):
        raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    raw = data[_LENGTH : _LENGTH + length]
    tensors = json.loads(raw)
    return raw, tensors.pop("__metadata__"), tensors


def _signer(secret: bytes) -> str:
    """Tells secrets apart without telling them: what says that a file was signed with another one, not changed."""
    return hmac.new(secret, b"kvcache signer", hashlib.sha256).hexdigest()[:16]


def _unsigned(signer: object, secret: bytes | None) -> SignatureError:
    if secret is None:
        return SignatureError("it is signed, and nothing was given to check that with; give what it was signed with")
    said = "not signed" if signer is None else "signed by someone else"
    return SignatureError(f"it is {said}; it will not be used, write it again, or give what it was signed with")


def _checksum(data: bytes, at: int, secret: bytes | None) -> str:
    """Over every byte but its own; in chunks, as hashlib lets other cores help."""
    view = memoryview(data)
    after = at + len(_UNSET)
    chunks = [view[:at], *(view[i : i + _CHUNK] for i in range(after, len(data), _CHUNK))]
    total = f"{len(data)} {at} ".encode() + b"".join(_digests(chunks))
    return (hashlib.sha256(total) if secret is None else hmac.new(secret, total, hashlib.sha256)).hexdigest()


def _digests(chunks: list[memoryview]) -> list[bytes]:
    def digest(chunk: memoryview) -> bytes:
        return hashlib.sha256(chunk).digest()

    if len(chunks) > 2:
        with (
            suppress(RuntimeError),
            ThreadPoolExecutor() as pool,
        ):  # no thread starts when the program ends, or has too many
            return list(pool.map(digest, chunks))
    return list(map(digest, chunks))


def check_finite(states: Tensor, where: str) -> None:
    """Raise `CorruptError` unless all of these keys or values, of any shape, are finite numbers.

    Args:
        where: what holds them, for the message.
    """
    if not states.is_floating_point():
        raise CorruptError(f"{where} holds {states.dtype}, no keys and values")
    if not states.numel():
        return
    try:
        ends = (states.float() if states.dtype.itemsize == 1 else states).aminmax()  # of which float8 has none
    except RuntimeError as error:  # a kind of number that torch can hold, and not read
        raise CorruptError(f"{where} holds {states.dtype}, which cannot be read") from error
    if not all(math.isfinite(end) for end in ends):  # NaN is both ends
        raise CorruptError(f"{where} holds numbers that are not finite")
