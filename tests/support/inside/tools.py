"""Inside of the tools: what they ask of the machine, and their parts one by one."""

from typing import Any

from kvcache.monitoring import _timeline
from kvcache.tools import _planning, _profiling, doctor
from kvcache.tools._footprint import held, language_footprint  # of tensors and of models that have no name
from kvcache.tools._language import LanguageTarget  # of a folder, whatever is in it
from kvcache.tools._language import PreparedLanguage as LanguageRunner
from kvcache.tools._module_timer import AUDIO, part_of
from kvcache.tools._planning import process_bytes
from kvcache.tools._profiling import weight_bytes
from kvcache.tools._tuning_search import AXES
from kvcache.tools._tuning_vocoder import tuned_vocoder  # on a clock of the test's
from kvcache.tools.doctor import _decoding as doctor_decoding  # whose questions are answered by the test
from kvcache.tools.doctor import _machine as doctor_machine
from kvcache.tools.doctor import _packages as doctor_packages
from kvcache.tools.doctor import _stores as doctor_stores
from kvcache.tools.doctor._decoding import _trial as doctor_trial
from kvcache.tools.doctor._decoding import backends as doctor_backends  # one section of findings each
from kvcache.tools.doctor._machine import _gpus as doctor_gpus
from kvcache.tools.doctor._machine import devices as doctor_devices
from kvcache.tools.doctor._stores import default_store as doctor_default_store

__all__ = [
    "AUDIO",
    "AXES",
    "LanguageRunner",
    "LanguageTarget",
    "doctor",
    "doctor_backends",
    "doctor_decoding",
    "doctor_default_store",
    "doctor_devices",
    "doctor_gpus",
    "doctor_machine",
    "doctor_packages",
    "doctor_stores",
    "doctor_trial",
    "held",
    "language_footprint",
    "part_of",
    "process_bytes",
    "tuned_vocoder",
    "weight_bytes",
]

DOCTOR_BACKENDS = "kvcache.tools.doctor._diagnosis.backends"  # which take the time
DOCTOR_COMPILER = "kvcache.tools.doctor._decoding._no_compiler"
DOCTOR_CPUS = "kvcache.tools.doctor._machine._usable_cpus"
DOCTOR_PACKAGES = "kvcache.tools.doctor._diagnosis.packages"  # with which it begins
DOCTOR_TRIAL = "kvcache.tools.doctor._decoding._trial"
ENTRY_POINTS = "kvcache.tools._targets.entry_points"
METRICS = "kvcache.monitoring._metrics"  # which needs a package of its own
PLANNED_PROCESS_BYTES = "kvcache.tools._planning.process_bytes"
PLANNED_RESIDENT_BYTES = "kvcache.tools._planning.resident_bytes"

# What each of those asks that tell of a process's memory.
RESIDENT_BYTES: list[Any] = [vars(module)["resident_bytes"] for module in (_planning, _profiling, _timeline)]
