"""Tensors and a JSON header in one safetensors file whose every byte is covered by a checksum.

What comes from a disk or a network is checked before anything in it is used: first the checksum, then what it says. With
a secret the checksum is an HMAC, and what was not written by someone who knows the secret is refused.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import safetensors.torch
from torch import Tensor

from kvcache.errors import CorruptError

_UNSET = "0" * 64
_PLACE = f'"checksum":"{_UNSET}"'.encode()  # nowhere else: quotes within the header are escaped
_LENGTH = 8  # a safetensors file begins with the length of its header, little-endian
_LONGEST_HEADER = 16 * 2**20
_CHUNK = 4 * 2**20


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], secret: bytes | None = None) -> bytes:
    """A safetensors file with these tensors, a header (JSON) and a checksum."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"header": json.dumps(header, sort_keys=True), "checksum": _UNSET}
    data = safetensors.torch.save(plain, metadata)
    at = data.index(_PLACE, _LENGTH) + _PLACE.index(_UNSET.encode())
    return b"".join((data[:at], _checksum(data, at, secret).encode(), data[at + len(_UNSET) :]))


def unpack(data: bytes, secret: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `pack` wrote.

    Raises:
        CorruptError: if one byte is not as it was written, or the file was written with another secret.
    """
    try:
        length = int.from_bytes(data[:_LENGTH], "little")
        if not 0 < length <= min(_LONGEST_HEADER, len(data) - _LENGTH):
            raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
        raw = data[_LENGTH : _LENGTH + length]
        metadata = json.loads(raw)["__metadata__"]
        header, checksum = metadata["header"], metadata["checksum"]
        if len(checksum) != len(_UNSET) or raw.count(checksum.encode()) != 1:
            raise ValueError("no checksum in the header")
        at = _LENGTH + raw.index(checksum.encode())
        if not hmac.compare_digest(_checksum(data, at, secret).encode(), checksum.encode()):
            raise ValueError("the checksum is not that of the content")
        tensors, fields = safetensors.torch.load(data), json.loads(header)
        if not isinstance(fields, dict):
            raise ValueError("a header without fields")
    except Exception as error:  # JSON, Unicode, missing or mistyped fields, safetensors' own: what is wrong is wrong
        raise CorruptError(f"not an intact file of kvcache's: {error}; it will not be used, write it again") from error
    return tensors, fields


def _checksum(data: bytes, at: int, secret: bytes | None) -> str:
    """Over every byte but its own; in chunks, as hashlib lets other cores help."""
    view = memoryview(data)
    after = at + len(_UNSET)
    chunks = [view[:at], *(view[i : i + _CHUNK] for i in range(after, len(data), _CHUNK))]
    if len(chunks) == 2:
        digests = [hashlib.sha256(chunk).digest() for chunk in chunks]
    else:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks))
    total = f"{len(data)} {at} ".encode() + b"".join(digests)
    return (hashlib.sha256(total) if secret is None else hmac.new(secret, total, hashlib.sha256)).hexdigest()
