"""What caches hold and take, while they do: a timeline, a map, metrics."""

from kvcache.monitoring._metrics import CacheMetrics, SchedulerCollector
from kvcache.monitoring._occupancy import Occupancy, occupancy, positions_by_head
from kvcache.monitoring._timeline import MemoryTimeline, Sample

__all__ = [
    "CacheMetrics",
    "MemoryTimeline",
    "Occupancy",
    "Sample",
    "SchedulerCollector",
    "occupancy",
    "positions_by_head",
]
