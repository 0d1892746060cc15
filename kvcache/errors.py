"""What can go wrong. Every message says what was given, the limit, and the next step; what failed has changed nothing."""

from typing import Any


class KVCacheError(Exception):
    """Base of all errors that kvcache raises on purpose."""


class CapacityError(KVCacheError):
    """More tokens than the cache, or the model's position table, has room for."""


class GeometryError(KVCacheError, ValueError):
    """Keys or values whose shape, dtype or device is not the cache's."""


class PolicyError(KVCacheError, ValueError):
    """A size policy or limit that cannot work: negative, zero, or contradicting another."""


class PositionsError(KVCacheError, ValueError):
    """Eviction or re-rotation asked of a model whose position encoding makes it silently wrong."""


class RollbackError(KVCacheError):
    """A roll back to a length from which tokens have been evicted since."""


class InputError(KVCacheError, ValueError):
    """A request that cannot be run as given, for example text tokens without their start and stop token."""


class MissingDependencyError(InputError, ModuleNotFoundError):
    """A package that this needs is not installed: an `ImportError`, whose message says the command that installs it."""


class BusyError(KVCacheError):
    """More requests than may wait. Nothing is wrong with this one; it may come again later.

    Attributes:
        retry_after: seconds after which to come again, as far as can be told; None if it cannot.
    """

    def __init__(self, message: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(KVCacheError):
    """A request to what has been closed, or closes before it has answered."""


class CorruptError(KVCacheError, ValueError):
    """A file or value from a disk or network that is not what was written, or not what it says it is."""


class SignatureError(CorruptError):
    """A file that is signed with another secret than was given, or not at all; whether it is intact cannot be told."""


class StoreError(KVCacheError):
    """A store that is down, slow, full or not allowed, for who looks after it. A request never sees this: it computes."""


def said(error: BaseException) -> str:
    """What an error says, in words where it is a `KeyError`, which only says a name."""
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)


def check_whole(name: str, given: Any, least: int) -> None:
    """Raise `InputError` for what is no whole number of at least `least`."""
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise InputError(f"{name}={given!r} must be a whole number of at least {least}")
