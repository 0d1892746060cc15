"""Plan, profile, tune and examine anything that has a name."""

from kvcache.tools._footprint import (
    Footprint,
    Moment,
    VocoderFootprint,
    buffers,
    bytes_in,
    fill,
    onednn_bytes,
    step_bytes,
    written_static,
)
from kvcache.tools._module_timer import PARTS, Watch
from kvcache.tools._planning import MOST_REQUESTS, Device, MemoryPlan, Room, plan, room
from kvcache.tools._plotting import check_plot, plot
from kvcache.tools._profile import MEMORY, Memory, Profile, Times, shown_seconds
from kvcache.tools._profiling import profile
from kvcache.tools._target import ModelTarget, Prepared, check_vocoder
from kvcache.tools._targets import subject
from kvcache.tools._tuning import SubjectBench, TuneArguments, Tuned, TuneOptions, tune
from kvcache.tools._tuning_search import Refusal, Space, Tuner, shown
from kvcache.tools._tuning_space import space_of
from kvcache.tools.doctor import Finding, diagnose, healthy

__all__ = [
    "MEMORY",
    "MOST_REQUESTS",
    "PARTS",
    "Device",
    "Finding",
    "Footprint",
    "Memory",
    "MemoryPlan",
    "ModelTarget",
    "Moment",
    "Prepared",
    "Profile",
    "Refusal",
    "Room",
    "Space",
    "SubjectBench",
    "Times",
    "TuneArguments",
    "TuneOptions",
    "Tuned",
    "Tuner",
    "VocoderFootprint",
    "Watch",
    "buffers",
    "bytes_in",
    "check_plot",
    "check_vocoder",
    "diagnose",
    "fill",
    "healthy",
    "onednn_bytes",
    "plan",
    "plot",
    "profile",
    "room",
    "shown",
    "shown_seconds",
    "space_of",
    "step_bytes",
    "subject",
    "tune",
    "written_static",
]
