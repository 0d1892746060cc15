"""Many prompts for many clients, on one batch of a language model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from kvcache.decoding import Chunk, Scheduler, SchedulerFront, Stream, Work
from kvcache.errors import check_whole
from kvcache.manager._batches import BatchRoom, BatchRoomFields
from kvcache.manager._manager import KVCacheManager
from kvcache.manager._options import Backends, value_of


class TextSchedulerFields(BatchRoomFields, total=False):
    """The fields of `TextSchedulerOptions`, as keyword arguments."""

    backend: Backends | None
    max_waiting: int
    ahead: int


@dataclass(frozen=True)
class TextSchedulerOptions(BatchRoom):
    """The room of a scheduler's batch, and for how many clients it decodes.

    Attributes:
        backend: as in `KVCacheManager.batch`.
        max_waiting: requests that may wait for a row; one more is refused.
        ahead: chunks that may lie undelivered.

    Raises:
        InputError, PolicyError: for a number that cannot be.
    """

    backend: Backends | None = None
    max_waiting: int = 64
    ahead: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_waiting", "ahead"):
            check_whole(name, getattr(self, name), 1)


class TextScheduler(SchedulerFront):
    """Decodes prompts of many clients together; they join and leave while others decode.

    ``async with TextScheduler(manager) as scheduler`` starts and ends its thread; `submit` gives one prompt's tokens.

    Args:
        manager: around a language model.
        options: or its fields as keywords.

    Attributes:
        rows: prompts that decode together at most.

    Raises:
        InputError: if the model or its policy does not decode on the engine, with the reason.
        CapacityError: if the budget does not hold one row.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        options: TextSchedulerOptions | None = None,
        **fields: Unpack[TextSchedulerFields],
    ) -> None:
        self._manager = manager
        self._options = asked = value_of(TextSchedulerOptions, options, fields, "TextScheduler")
        self.rows = manager.batches.room(asked)[0]
        backend = manager.backend if asked.backend is None else asked.backend
        super().__init__(
            Scheduler(
                lambda: manager.batches.opened(asked, backend),
                self.rows,
                max_waiting=asked.max_waiting,
                ahead=asked.ahead,
            )
        )

    def __repr__(self) -> str:
        metrics = self.metrics()
        state = "closed" if self.closed else "running"
        return f"{type(self).__name__}(rows={self.rows}, {state}, {metrics.waiting + metrics.running} requests)"

    def submit(
        self,
        inputs: Tensor,
        *,
        prefix: str | None = None,
        seed: int | None = None,
        chunk_size: int = 8,
        **kwargs: Any,
    ) -> Stream[Tensor]:
        """One prompt's new tokens in chunks ``[n]`` of `chunk_size`; the last may be shorter.

        They are those that it would have alone, up to rounding: products of more rows add up in another order, and a draw that
        lies within that of a boundary may fall on its other side. Closing the stream, cancelling who waits for it, or forgetting
        it frees its row.

        Args:
            inputs: token ids ``[tokens]`` or ``[1, tokens]``.
            prefix: the name of one added with `KVCacheManager.add_prefix`: computed once for all prompts behind it.
            seed: of its draws, see `PromptBatch.add`.
            chunk_size: tokens in a chunk.
            **kwargs: as in `generate`, for this prompt alone.

        Raises:
            InputError: for a chunk size below 1.
            BusyError: if there is no room; its ``retry_after`` says in how many seconds there may be.
            ClosedError: outside ``async with``, in another event loop, or after an error that stayed (see `error`).

        What else cannot be decoded, the stream says in place of its first tokens, as `InputError` or `CapacityError`.
        """
        check_whole("chunk_size", chunk_size, 1)
        if seed is None:
            seed = int(torch.randint(2**31, ()))

        def prepare() -> Work[Tensor]:
            piece = self._options.prefill_chunk
            job = self._manager.batches.job(inputs, kwargs, prefix=prefix, seed=seed, prefill_chunk=piece)
            return Work(1, lambda index, before: job, _tokens)

        return self._scheduler.submit_prepared(prepare, size=chunk_size)


def _tokens(chunk: Chunk) -> Iterator[Tensor]:
    if chunk.tokens.numel():
        yield chunk.tokens
