"""Numbers of bytes, as people write them."""

import re
from fractions import Fraction

from kvcache.errors import PolicyError

# 2GB, 2G and 2g are 2 * 10**9; 2GiB, 2Gi and 2gib are 2 * 2**30.
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", 1):
    _UNITS |= dict.fromkeys((_letter, f"{_letter}B"), 1000**_power)
    _UNITS |= dict.fromkeys((f"{_letter}I", f"{_letter}IB"), 1024**_power)


def parse_bytes(size: int | str) -> int:
    """The number of bytes in ``"512MiB"``, ``"1.5 GB"``, ``"2G"``, ``"2Gi"`` or a plain number; up to PiB.

    Raises:
        PolicyError: if it is not a size of at least one byte.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise PolicyError(
                f"cannot read {size!r} as a size; write for example '512MiB', '1.5GB' or a number of bytes"
            )
        size = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise PolicyError(f"bytes={size!r} must be a whole number of at least 1")
    return size
