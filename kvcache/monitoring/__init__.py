"""What caches hold and take, while they do: a timeline, a map, metrics."""

from importlib import import_module
from typing import TYPE_CHECKING

from kvcache.monitoring._occupancy import Occupancy, occupancy, positions_by_head
from kvcache.monitoring._timeline import MemoryTimeline, Sample

if TYPE_CHECKING:
    from kvcache.monitoring._metrics import CacheMetrics, SchedulerCollector

__all__ = [
    "CacheMetrics",
    "MemoryTimeline",
    "Occupancy",
    "Sample",
    "SchedulerCollector",
    "occupancy",
    "positions_by_head",
]

if not TYPE_CHECKING:  # or every name would be one that the package has

    def __getattr__(name):
        """What needs prometheus-client, which is an extra, asks for it when it is asked for itself."""
        if name in ("CacheMetrics", "SchedulerCollector"):
            return getattr(import_module("kvcache.monitoring._metrics"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
