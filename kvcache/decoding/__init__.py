"""The decode engine: static caches, a sampler and whole steps on the device, run eagerly, compiled or as a graph."""

from kvcache.decoding._backends import (
    BUCKET,
    RECORDERS,
    BackendName,
    Recorder,
    backend_for,
    backend_on,
    check_bucket,
    cuda_graph,
    runs_on,
)
from kvcache.decoding._batch import PREFILL_CHUNK, Batch, Job, JobOutput, Piece, Prefilled, rows_within
from kvcache.decoding._chunks import chunks_of
from kvcache.decoding._compiling import Refused, compiled
from kvcache.decoding._drafts import Drafts
from kvcache.decoding._ends import Criteria, Said, TextEnd
from kvcache.decoding._engine import Decoding, StepOptions
from kvcache.decoding._front import SchedulerFront
from kvcache.decoding._generation_settings import GenerationSettings
from kvcache.decoding._kernel import decode_attention
from kvcache.decoding._language import LanguageDecoder
from kvcache.decoding._ledger import SchedulerMetrics
from kvcache.decoding._pool import Pool
from kvcache.decoding._program import Bound, Program, fits
from kvcache.decoding._program_files import ProgramFiles
from kvcache.decoding._programs import Ahead, Made, Programs, RootSizes
from kvcache.decoding._provenance import made_by
from kvcache.decoding._request_stream import Stream
from kvcache.decoding._sampler import GREEDY, Drawing, Sampler, Sampling, ScoreRule
from kvcache.decoding._scheduler import Scheduler, Work
from kvcache.decoding._setting import Backend, Setting, VocoderSetting
from kvcache.decoding._static_cache import StaticKV
from kvcache.decoding._streaming import as_async, chunked, from_worker, in_thread
from kvcache.decoding._token_rules import (
    LONGEST_NGRAM,
    HostProcessors,
    RepeatedNGrams,
    RuleRoom,
    TokenLimits,
    TokenRules,
    processor_name,
)
from kvcache.decoding._tuning_profile import (
    Goal,
    Trial,
    TuningProfile,
    VocoderTrial,
    dtype_name,
    machine,
    setting_to_dict,
    versions,
)
from kvcache.decoding._turns import Chunk, Request, Turns
from kvcache.decoding._warming import Told, WarmUp, untold
from kvcache.decoding._wiring import DecodeInputs, HeadWatch, decoder_copy, kernel_reason, unsupported_reason

__all__ = [
    "BUCKET",
    "GREEDY",
    "LONGEST_NGRAM",
    "PREFILL_CHUNK",
    "RECORDERS",
    "Ahead",
    "Backend",
    "BackendName",
    "Batch",
    "Bound",
    "Chunk",
    "Criteria",
    "DecodeInputs",
    "Decoding",
    "Drafts",
    "Drawing",
    "GenerationSettings",
    "Goal",
    "HeadWatch",
    "HostProcessors",
    "Job",
    "JobOutput",
    "LanguageDecoder",
    "Made",
    "Piece",
    "Pool",
    "Prefilled",
    "Program",
    "ProgramFiles",
    "Programs",
    "Recorder",
    "Refused",
    "RepeatedNGrams",
    "Request",
    "RootSizes",
    "RuleRoom",
    "Said",
    "Sampler",
    "Sampling",
    "Scheduler",
    "SchedulerFront",
    "SchedulerMetrics",
    "ScoreRule",
    "Setting",
    "StaticKV",
    "StepOptions",
    "Stream",
    "TextEnd",
    "TokenLimits",
    "TokenRules",
    "Told",
    "Trial",
    "TuningProfile",
    "Turns",
    "VocoderSetting",
    "VocoderTrial",
    "WarmUp",
    "Work",
    "as_async",
    "backend_for",
    "backend_on",
    "check_bucket",
    "chunked",
    "chunks_of",
    "compiled",
    "cuda_graph",
    "decode_attention",
    "decoder_copy",
    "dtype_name",
    "fits",
    "from_worker",
    "in_thread",
    "kernel_reason",
    "machine",
    "made_by",
    "processor_name",
    "rows_within",
    "runs_on",
    "setting_to_dict",
    "unsupported_reason",
    "untold",
    "versions",
]
