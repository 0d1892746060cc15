"""What works on this machine, what does not, and why: what `kvcache doctor` says."""

from collections.abc import Iterable

import torch

from kvcache.prefixes.stores import open_store, shown_place
from kvcache.tools.doctor._decoding import backends, programs
from kvcache.tools.doctor._finding import Finding
from kvcache.tools.doctor._machine import devices, precisions
from kvcache.tools.doctor._packages import packages
from kvcache.tools.doctor._stores import default_store, round_trip


def diagnose(
    store: str | None = None, *, secret: bytes | None = None, namespace: str | None = None, compiling: bool = False
) -> list[Finding]:
    """Look at packages, devices, ways to decode and stores; nothing is changed, and what is written is removed again.

    Args:
        store: the place of one to try besides the default one, see `kvcache.prefixes.stores.open_store`.
        secret, namespace: of that store.
        compiling: also compile a decode step, which takes up to minutes.

    Raises:
        InputError: if `store` cannot be the place of one.
    """
    asked = any(given is not None for given in (store, secret, namespace))
    opened = open_store(store, secret=secret, namespace=namespace) if asked else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        *packages(),
        *devices(),
        *precisions(device),
        *backends(device, compiling),
        programs(),
        default_store(),
    ]
    if opened is not None:
        with opened:
            found.append(round_trip(opened, shown_place(store), secret))
    return found


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing that is needed is broken."""
    return all(finding.state != "broken" for finding in findings)
