"""Inside of the decode engine: steps that a test makes or breaks, and what has to be empty afterwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from kvcache import KVCacheManager
from kvcache.decoding import Batch, Decoding, Pool, Sampler, Scheduler, StaticKV, Stream
from kvcache.decoding import _kernel as kernel  # its tiles are made small, and what it compiles is watched
from kvcache.decoding._backends import (  # made with recorders and compilers that fail or count
    Compiled,
    Graph,
    check_backend,
)
from kvcache.decoding._drafts import (  # a guess by itself; drafts whether they pay or not
    DraftedSteps,
    Drafting,
    looked_up,
    said_at_once,
)
from kvcache.decoding._processors import read_processors  # of lists that no generation makes
from kvcache.decoding._sampler import (  # the order of generate, of samplers that are run by themselves; of devices that are not here
    TRANSFORMERS,
    default_generator,
)
from kvcache.decoding._streaming import AsyncItems  # whose items are made in a thread of the test's own
from kvcache.decoding._token_rules import ALWAYS  # a step that never comes
from kvcache.decoding._wiring import StaticLayer, attend  # an attention by itself; whose updates are timed

__all__ = [
    "ALWAYS",
    "TRANSFORMERS",
    "AsyncItems",
    "Compiled",
    "DraftedSteps",
    "Drafting",
    "Graph",
    "StaticLayer",
    "attend",
    "check_backend",
    "default_generator",
    "kernel",
    "looked_up",
    "read_processors",
    "said_at_once",
]

COMPILED = "kvcache.decoding._backends.Compiled"  # with torch's compiler without its slow half
EMIT_EVICTIONS = "kvcache.decoding._static_cache.StaticKV.emit_evictions"
KERNEL_DOT_TILE = "kvcache.decoding._kernel._DOT_TILE"
KERNEL_INTERPRETED = "kvcache.decoding._kernel._interpreted"
KERNEL_REASON = "kvcache.decoding._wiring.kernel_reason"  # for steps without the kernel where there is one
KERNEL_TILE = "kvcache.decoding._kernel._TILE"  # a small one makes several blocks of a few slots
LANGUAGE_COPY = "kvcache.decoding._language.decoder_copy"
MAKE_FX = "kvcache.testing._traces.make_fx"  # for a recording that fails
PROGRAMS_BEGUN = "kvcache.decoding._programs._begun"  # what this process has begun, found wanting and loaded
PROGRAMS_COMPILED = "kvcache.decoding._programs.compiled"
PROGRAMS_FAILED = "kvcache.decoding._programs._failed"
PROGRAMS_LOADED = "kvcache.decoding._programs._loaded"
PROGRAMS_ROOM = "kvcache.decoding._program_files._ALL"
SCHEDULER_CLOCK = "kvcache.decoding._ledger.time"
TURNS_CLOCK = "kvcache.decoding._turns.time"
WORKER_QUEUE = "kvcache.decoding._streaming.queue"
ZEROS = "kvcache.decoding._static_cache.zeros"  # the system's own pages, which cannot be faked


# ---------------------------------------------------------------------- caches and samplers


def policies_of(kv: StaticKV) -> list[Any]:
    """The policy of each row, None where it is free."""
    return kv._policies


def pending_of(kv: StaticKV) -> Sequence[Any]:
    """What is still to be copied from where it was prefilled."""
    return kv._pending


def settings_of(sampler: Sampler) -> list[Any]:
    """The settings of each request's place."""
    return sampler._chosen


# ---------------------------------------------------------------------- one decoding


def backend_of(decoding: Decoding) -> Any:
    return decoding._backend


def run_by(decoding: Decoding, backend: Any) -> Any:
    """Let a back end of the test's run the steps, and give that."""
    decoding._backend = backend
    return backend


def owner_of(backend: Any) -> Any:
    """The decoding whose steps were recorded last."""
    return backend._of


def recorded(backend: Any) -> Mapping[Any, Any]:
    """The recordings, by their columns and by how tokens are drawn."""
    return cast(Mapping[Any, Any], backend._recorded)


def forward_of(decoding: Decoding) -> Callable[..., Any]:
    return decoding._forward


def run_with(decoding: Decoding, forward: Callable[..., Any]) -> None:
    """Let a function of the test's stand for the model."""
    decoding._forward = forward


def column_of(decoding: Decoding) -> Any:
    """Which token of a chunk a step decodes, on the device."""
    return decoding._column


def inputs_of_step(decoding: Decoding, columns: int) -> Any:
    """What a step gives the model, where all rows see their first columns."""
    return decoding._inputs.of_step(decoding.order[:columns], True)


def generators_of(decoding: Decoding) -> list[Any]:
    return decoding._generators


def fronts_of(decoding: Decoding) -> Mapping[int, Decoding]:
    """The decodings of its first rows that have run, by their number of places."""
    return decoding._fronts


# ---------------------------------------------------------------------- batches


def decoding_of(batch: Batch) -> Decoding:
    return batch._decoding


def jobs_of(batch: Batch) -> list[Any]:
    """Who has each place, None where it is free."""
    return batch._jobs


def sizes_of(batch: Batch) -> list[int]:
    """The numbers of places that a step may run."""
    return batch._sizes


def state_of(batch: Batch) -> tuple[list[Any], tuple[Any, ...]]:
    """All that a batch holds besides the cache: tensors, and what is in lists."""
    decoding = batch._decoding
    tensors = [*decoding.state(), decoding.sampler._settings, decoding.sampler._top_k]
    held = list(batch._jobs), list(batch._made), list(decoding._generators), list(decoding.sampler._chosen)
    return tensors, held


# ---------------------------------------------------------------------- pools and threads


def idle(pool: Pool) -> dict[Any, Any]:
    """The decodings that wait for the next request, by kind."""
    return pool._idle


def pool_of(manager: KVCacheManager) -> Pool:
    return manager.engine.decoder._pool


def maker_of(items: AsyncItems[Any]) -> Callable[[], Any]:
    """What makes the next item, in whatever thread it is called."""
    return items._make


def programs_of(function: Any) -> Sequence[Any]:
    """What a function compiled ahead of time has made or loaded."""
    return cast(Sequence[Any], function._programs.made)


# ---------------------------------------------------------------------- schedulers


def turns_of(scheduler: Scheduler) -> Any:
    return scheduler._turns


def inboxes_of(scheduler: Scheduler) -> Any:
    return scheduler._inboxes


def inbox_of(stream: Stream[Any]) -> Any:
    """Where the items of a stream wait, and the request that they are of."""
    return stream._inbox


def dropped_by(scheduler: Scheduler) -> Any:
    """Streams that nobody holds any more, and that the thread has not let go of."""
    return scheduler._dropped


def first_items_of(scheduler: Scheduler) -> Any:
    """The seconds to the first item, of the last requests."""
    return scheduler._ledger.firsts


def order_of(scheduler: Scheduler) -> Any:
    return scheduler._order


def threads_of(scheduler: Scheduler) -> Any:
    return scheduler._threads


def told_of_changes_by(scheduler: Scheduler, changed: Any) -> None:
    """Let the thread wait for a condition of the test's."""
    scheduler._changed = changed
