"""What works on this machine, what does not, and what to do about it."""

from kvcache.tools.doctor._diagnosis import diagnose, healthy
from kvcache.tools.doctor._finding import Finding

__all__ = ["Finding", "diagnose", "healthy"]
