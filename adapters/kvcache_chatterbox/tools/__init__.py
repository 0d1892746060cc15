"""What kvcache's commands ask of a Chatterbox model."""

from kvcache_chatterbox.tools._targets import LoadedSubject, endless

__all__ = [
    "LoadedSubject",
    "endless",
]
