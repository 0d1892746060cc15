"""What the doctor says of one thing."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing", "broken"]

ELSEWHERE = "set KVCACHE_HOME to a folder that may be written to"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: what it is about: ``"packages"``, ``"devices"``, ``"back ends"``, ``"stores"``.
        name: of the thing.
        state: ``"ok"``; ``"note"``, works but is worth a look; ``"missing"``, not there and not needed; ``"broken"``.
        said: what was found.
        advice: what to do about it; None if nothing is to be done.
    """

    section: str
    name: str
    state: State
    said: str
    advice: str | None = None
