"""Many prompts for many clients, on one batch of a language model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, TypedDict, Unpack

from kvcache.decoding import PREFILL_CHUNK, Chunk, Scheduler, SchedulerMetrics, Stream, Work
from kvcache.errors import InputError, check_whole
from kvcache.manager._batches import BatchRoom
from kvcache.manager._manager import KVCacheManager
from kvcache.manager._options import Backends


class TextSchedulerFields(TypedDict, total=False):
    """The fields of `TextSchedulerOptions`, as keyword arguments."""

    max_rows: int
    slots: int | None
    memory_budget: int | str | None
    backend: Backends | None
    prefill_chunk: int
    max_waiting: int
    ahead: int


@dataclass(frozen=True)
class TextSchedulerOptions:
    """For how many clients a scheduler decodes, and within which limits.

    Attributes:
        max_rows, slots, memory_budget, prefill_chunk: see `BatchRoom`.
        backend: as in `KVCacheManager.batch`.
        max_waiting: requests that may wait for a row; one more is refused.
        ahead: chunks that may lie undelivered.

    Raises:
        InputError, PolicyError: for a number that cannot be.
    """

    max_rows: int = 8
    slots: int | None = None
    memory_budget: int | str | None = None
    backend: Backends | None = None
    prefill_chunk: int = PREFILL_CHUNK
    max_waiting: int = 64
    ahead: int = 32

    def __post_init__(self) -> None:
        for name in ("max_waiting", "ahead"):
            check_whole(name, getattr(self, name), 1)
        _ = self.room

    @classmethod
    def of(cls, options: "TextSchedulerOptions | None", given: Mapping[str, Any]) -> "TextSchedulerOptions":
        """The options that a scheduler's arguments stand for.

        Raises:
            InputError: for an unknown keyword, or keywords beside options.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise InputError(f"{unknown[0]} is no setting of TextScheduler; those are {', '.join(names)}")
        if options is not None and given:
            raise InputError(
                f"TextSchedulerOptions and {', '.join(given)} are given; put them into the options with dataclasses.replace()"
            )
        return cls(**given) if options is None else options

    @property
    def room(self) -> BatchRoom:
        """Of the batch."""
        return BatchRoom(self.max_rows, self.slots, self.memory_budget, self.prefill_chunk)


class TextScheduler:
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
        self._manager, self._options = manager, TextSchedulerOptions.of(options, fields)
        asked = self._options
        self.rows = manager.batches.room(asked.room)[0]
        backend = manager.backend if asked.backend is None else asked.backend
        self._scheduler = Scheduler(
            lambda: manager.batches.opened(asked.room, backend),
            self.rows,
            max_waiting=asked.max_waiting,
            ahead=asked.ahead,
        )

    def __repr__(self) -> str:
        metrics = self.metrics()
        state = "closed" if self.closed else "running"
        return f"{type(self).__name__}(rows={self.rows}, {state}, {metrics.waiting + metrics.running} requests)"

    async def __aenter__(self) -> Self:
        await self._scheduler.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests, whose clients are told, and the threads."""
        await self._scheduler.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no requests: not yet begun, closed, or ended by an error."""
        return self._scheduler.closed

    @property
    def error(self) -> BaseException | None:
        """What ended it, or came up when it was closed; None while all is well."""
        return self._scheduler.error

    def metrics(self) -> SchedulerMetrics:
        """What it does and has done; ``ttfa`` is to the first tokens."""
        return self._scheduler.metrics()

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
            seed: of its draws, see `KVCacheManager.job`.
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
