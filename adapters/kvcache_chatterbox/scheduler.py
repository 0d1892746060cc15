"""Many texts at once, for an event loop: audio of each as its segments are decoded beside everybody else's."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from kvcache import InputError
from kvcache.decoding import Chunk, Job, Scheduler, SchedulerMetrics, Stream, Work
from kvcache.prefixes.stores import Aside
from kvcache_chatterbox.audio import Chunks, SegmentedAudio, chunking_of
from kvcache_chatterbox.checks import check_count
from kvcache_chatterbox.engine import ChatterboxEngine
from kvcache_chatterbox.speech import Carry, LongText, SamplingOptions, tell_cut_off
from kvcache_chatterbox.vocoder import OneAtATime, Together, most_together
from kvcache_chatterbox.voices import Voice

_LAST_WRITES = 2.0  # seconds


class SpeechScheduler:
    """Speaks for many clients on one engine, their segments decoded together.

    ``async with SpeechScheduler(engine) as scheduler`` starts and ends its thread; `submit` gives one client's audio.

    Args:
        engine: around a whole Chatterbox model.
        max_rows: segments that decode together at most; with guidance each takes two rows of the cache.
        memory_budget: bytes that their cache may take, or ``"200MiB"``; fewer rows where not all fit.
        max_waiting: clients that may wait for their first row; one more is refused.
        max_running: texts of several segments that may have begun, by default twice the rows; see
            `kvcache.decoding.Scheduler`.
        max_characters: of a text.
        slots: tokens that a segment may come to, voice, text and speech; by default the engine's `max_cache_length`.
        ahead, prefills, reserved: see `kvcache.decoding.Scheduler`.
        one_at_a_time: tokens and audio are computed by turns, audio first; by default on a CPU, whose cores both would divide
            their work among. Elsewhere both run at once.

    Raises:
        InputError: if the engine decodes one utterance at a time, or has no vocoder.
        CapacityError: if the budget does not hold one row.
    """

    def __init__(
        self,
        engine: ChatterboxEngine,
        *,
        max_rows: int = 8,
        memory_budget: int | str | None = None,
        max_waiting: int = 64,
        max_running: int | None = None,
        max_characters: int = 20_000,
        slots: int | None = None,
        ahead: int = 32,
        prefills: int = 8,
        reserved: int | None = None,
        one_at_a_time: bool | None = None,
    ) -> None:
        check_count("max_characters", max_characters)
        if one_at_a_time is None:
            one_at_a_time = torch.device(engine.t3.device).type == "cpu"
        self._by_turns = OneAtATime() if one_at_a_time else None
        self._engine = engine
        self._slots, self.rows = engine.room(max_rows, slots, memory_budget)
        self._max_characters = max_characters
        self._aside = Aside(engine.speakers)
        self._together = self._shared(None)
        self._scheduler = Scheduler(
            lambda: engine.batch(self.rows, self._slots),
            self.rows,
            max_waiting=max_waiting,
            max_running=max_running,
            ahead=ahead,
            prefills=prefills,
            reserved=reserved,
            within=nullcontext if self._by_turns is None else self._by_turns.tokens,
        )

    async def __aenter__(self) -> Self:
        await self._scheduler.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests, whose clients are told, and the threads. What was computed of voices and is still to be stored
        is waited for, 2 seconds at most."""
        await self._scheduler.close()
        await asyncio.to_thread(self._aside.flush, _LAST_WRITES)

    @property
    def closed(self) -> bool:
        """Whether it takes no requests: not yet begun, closed, or ended by an error."""
        return self._scheduler.closed

    @property
    def error(self) -> BaseException | None:
        """What ended it, or came up when it was closed; None while all is well."""
        return self._scheduler.error

    def metrics(self) -> SchedulerMetrics:
        """What it does and has done; ``ttfa`` is to the first audio."""
        return self._scheduler.metrics()

    def submit(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        chunking: Chunks = "auto",
        first_chunk: int | None = None,
        max_chunk: int | None = None,
        seed: int | None = None,
        pause: float = 0.2,
        carry: Carry | None = None,
        segment_characters: int | None = 200,
        watermark: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream[Tensor]:
        """One text's audio in chunks ``[1, samples]``. See `ChatterboxEngine.generate_stream` for the arguments.

        There is room for it when this returns. It is spoken in the voice that is meant now: a name that is given to another
        voice meanwhile, and another voice of the model's own, are for the requests after it; a clip's file is read later. The
        text is divided, tokenized, planned and looked up in another thread. Closing the
        stream, cancelling who waits for it, or forgetting it frees its rows.

        Raises:
            InputError: if the text has more than `max_characters`, or the chunks cannot be.
            BusyError: if there is no room; its ``retry_after`` says in how many seconds there may be.
            ClosedError: outside ``async with``, in another event loop, or after an error that stayed (see `error`).

        What else cannot be spoken, the stream says in place of its first audio, as `InputError` or `CapacityError`.
        """
        if isinstance(text, str) and len(text) > self._max_characters:
            raise InputError(
                f"the text has {len(text)} characters, max_characters is {self._max_characters}; send it in parts"
            )
        rule = chunking_of(chunking, first_chunk, max_chunk)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        chosen = self._chosen(voice, audio_prompt_path)

        def prepare() -> Work[Tensor]:
            who = chosen()
            long = self._engine.long_text(
                text,
                who,
                exaggeration=exaggeration,
                language_id=language_id,
                max_new_tokens=max_new_tokens,
                seed=seed,
                carry=carry,
                segment_characters=segment_characters,
                max_rows=self.rows,
                slots=self._slots,
                **sampling,
            )
            self._together = self._shared(self._together)  # one thread prepares
            audio = self._engine.audio(who, watermark, long, chunking=rule, pause=pause, vocoder=self._together)
            return self._work(long, audio)

        return self._scheduler.submit_prepared(prepare, size=rule.step, alone=rule.opening)

    def _shared(self, before: Together | None) -> Together:
        """The one vocoder of all streams: that of `before`, unless the model has another by now."""
        vocoder = self._engine.vocoder
        if before is not None and before.vocoder is vocoder:
            return before
        within = nullcontext if self._by_turns is None else self._by_turns.audio
        return Together(vocoder, most_together(self._engine.t3.device), within=within)

    def _chosen(self, voice: str | Voice | None, clip: str | os.PathLike[str] | None) -> Callable[[], Voice]:
        """Who speaks, as of now; that there is no such voice is said by the call, and so by the stream."""
        try:
            return self._engine.chosen_voice(voice, clip)
        except InputError as error:
            refusal = error

        def refused() -> Voice:
            raise refusal

        return refused

    def _work(self, long: LongText, audio: SegmentedAudio) -> Work[Tensor]:
        long = replace(long, utterances=self._engine.prepared(long.utterances, self._aside))
        last = len(long.utterances) - 1

        def job(index: int, before: Tensor | None) -> Job:
            return self._engine.job(long.utterance(index, before))

        before: list[float] = []

        def seconds(chunk: Chunk) -> float:
            """That its tokens took to decode, since those before."""
            took = chunk.at - before[0] if before else 0.0
            before[:] = [chunk.at]
            return took

        def heard(chunk: Chunk) -> Iterator[Tensor]:
            if chunk.cut_off:
                tell_cut_off(chunk.index, long.utterances[chunk.index].max_new_tokens)
            parts = [audio.push(chunk.index, chunk.tokens, seconds(chunk))]
            if chunk.last and chunk.index == last:
                parts.append(audio.finish())
            return (part for part in parts if part.numel())

        return Work(len(long.utterances), job, heard, sequence=long.carry is not None)
