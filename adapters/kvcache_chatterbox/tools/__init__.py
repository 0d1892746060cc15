"""What kvcache's commands ask of a Chatterbox model."""

from kvcache_chatterbox.tools._targets import LoadedTarget, endless, subject

__all__ = [
    "LoadedTarget",
    "endless",
    "subject",
]
