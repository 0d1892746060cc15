"""What happens to caches, decoding and prefixes, told as it happens: to the logger ``kvcache.events`` and to callbacks.

Nobody has to listen. Then a forward costs one look at a tuple and a logger's level, and nothing is put together.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Literal, Protocol, get_args

from typing_extensions import Self

from kvcache.errors import InputError

Kind = Literal[
    "evicted", "trimmed", "captured", "fell_back", "cut_off", "hit", "built", "extended", "replaced", "refused"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

log = logging.getLogger("kvcache.events")

_LEVELS: dict[Kind, int] = {"evicted": logging.DEBUG, "hit": logging.DEBUG, "refused": logging.DEBUG}  # others: INFO


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: ``"evicted"``: tokens left by their policy, once a forward or a chunk of the decode engine.
            ``"trimmed"``: they left because somebody asked for it.
            ``"captured"``: the decode engine recorded a step to replay.
            ``"fell_back"``: something else runs than was asked for.
            ``"cut_off"``: speech has come to its most tokens without an end: what is heard of it may stop in a word.
            ``"hit"``, ``"extended"``, ``"built"``: a prefix was found whole, in part, or not at all and computed.
            ``"replaced"``: the name of a prefix stands for another content from now on.
            ``"refused"``: a snapshot was found and not used: it is corrupt, or of another content.
        about: the policy, backend or prefix that it concerns.
        numbers: how much, by name: ``tokens`` (summed over layers and rows), ``layers``, ``rows``, ``seen``, ``columns``,
            ``nbytes``, ``seconds`` (that it took, or that a hit saved), ``known`` (tokens that an extension began with),
            ``segment`` (which of a text); each where it is known.
        reason: why, where something did not go as asked.
        time: when, as `time.time` tells it.
    """

    kind: Kind
    about: str
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    reason: str = ""
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        shown = {name: f"{n:.3g}" if isinstance(n, float) else n for name, n in self.numbers.items()}
        counts = ", ".join(f"{name} {value}" for name, value in shown.items())
        parts = (f"{self.kind.replace('_', ' ')}: {self.about}", f"({counts})" if counts else "", self.reason)
        return " ".join(part for part in parts if part)


Callback = Callable[[Event], object]

_listeners: tuple[tuple[Callback, frozenset[Kind]], ...] = ()
_lock = Lock()


class Subscription:
    """A callback that is being told events: until the ``with`` block is left, or `stop` is called."""

    def __init__(self, entry: tuple[Callback, frozenset[Kind]]) -> None:
        self._entry = entry

    def stop(self) -> None:
        """Tell it no more. Nothing happens the second time."""
        global _listeners
        with _lock:
            _listeners = tuple(entry for entry in _listeners if entry is not self._entry)

    def __call__(self) -> None:
        """As `stop`."""
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def subscribe(callback: Callback, kinds: Collection[Kind] = KINDS) -> Subscription:
    """Tell `callback` every event of these kinds, in the thread in which it happens, before that goes on.

    A callback that raises is logged with its traceback; the request does not notice.

    Args:
        callback: takes an `Event`. It should be quick, and must be safe for threads where requests run in several.
        kinds: which events.

    Returns:
        What ends it: call it, or use it as a context manager.

    Raises:
        InputError: for an unknown kind.
    """
    global _listeners
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
        raise InputError(f"kinds={kinds!r} must be some of {', '.join(map(repr, KINDS))}")
    entry = (callback, frozenset(kinds))
    with _lock:
        _listeners = (*_listeners, entry)
    return Subscription(entry)


def has_listeners(kind: Kind) -> bool:
    """Whether anybody would be told; to be asked before something is put together to tell."""
    return bool(_listeners) or log.isEnabledFor(_LEVELS.get(kind, logging.INFO))


def emit(event: Event, level: int | None = None) -> None:
    """Tell an event to all who listen.

    Args:
        event: what happened.
        level: of the line in the log; by default that of its kind.
    """
    log.log(_LEVELS.get(event.kind, logging.INFO) if level is None else level, "%s", event)
    for callback, kinds in _listeners:
        if event.kind in kinds:
            try:
                callback(event)
            except Exception:
                log.exception("a callback failed on: %s; the request goes on", event)


# ---------------------------------------------------------------------- tokens that leave


class Counted(Protocol):
    """A layer, as far as its evictions are told."""

    @property
    def policy(self) -> object:
        """What decides which tokens stay."""

    @property
    def seen(self) -> int:
        """Tokens that each row was given, pads among them."""

    @property
    def evicted(self) -> int:
        """Of these, tokens that have left."""

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None before the first tokens."""


class Evictions:
    """Tells what leaves the layers of one cache, once a forward, by comparing counts.

    Args:
        layers: all of them. What their policies say is theirs; here they are only counted.
    """

    def __init__(self, layers: Sequence[Counted]) -> None:
        self._layers = layers
        self._known: list[int] | None = None  # what had left each layer; None while nobody listens

    def before(self) -> None:
        """A forward begins."""
        if self._known is not None:
            self._tell(self._known)  # of layers that rank their tokens once they have been attended to
        elif has_listeners("evicted"):
            self._known = [layer.evicted for layer in self._layers]

    def after(self) -> None:
        """Every layer has had its turn."""
        if self._known is not None:
            self._tell(self._known)

    def forget(self) -> None:
        """Tokens came or went in another way: count from here."""
        self._known = None

    def _tell(self, known: Sequence[int]) -> None:
        if not has_listeners("evicted"):
            self._known = None
            return
        self._known = [layer.evicted for layer in self._layers]
        left = [max(0, now - then) for now, then in zip(self._known, known, strict=True)]
        if total := sum(left):
            layer = self._layers[max(range(len(left)), key=left.__getitem__)]
            rows = layer.rows or 1
            numbers = {"tokens": total * rows, "layers": sum(n > 0 for n in left), "rows": rows, "seen": layer.seen}
            emit(Event("evicted", repr(layer.policy), numbers))
