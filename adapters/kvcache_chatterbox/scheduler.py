"""Many texts at once, for an event loop: audio of each as its segments are decoded beside everybody else's."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from kvcache import InputError
from kvcache.decoding import Chunk, Job, Scheduler, SchedulerFront, Stream, Work
from kvcache.errors import check_whole
from kvcache.prefixes.stores import Aside
from kvcache_chatterbox.audio import SegmentedAudio
from kvcache_chatterbox.checks import check_count, check_flag, check_names
from kvcache_chatterbox.engine import ChatterboxEngine, RequestFields, SpeechRequest
from kvcache_chatterbox.speech import LongText, tell_cut_off
from kvcache_chatterbox.text import RowLimits
from kvcache_chatterbox.vocoder import OneAtATime, Together, most_together
from kvcache_chatterbox.voices import Voice

_LAST_WRITES = 2.0  # seconds


class SchedulerFields(TypedDict, total=False):
    """The fields of `SchedulerOptions` as keywords."""

    max_rows: int
    memory_budget: int | str | None
    max_waiting: int
    max_running: int | None
    max_characters: int
    slots: int | None
    ahead: int
    prefills: int
    reserved: int | None
    one_at_a_time: bool | None


@dataclass(frozen=True)
class SchedulerOptions:
    """For how many clients a scheduler speaks, and within which limits.

    Attributes:
        max_rows: segments that decode together at most; with guidance each takes two rows of the cache.
        memory_budget: bytes that their cache may take, or ``"200MiB"``; fewer rows where not all fit.
        max_waiting: clients that may wait for their first row; one more is refused.
        max_running: texts of several segments that may have begun; None: twice the rows; see `kvcache.decoding.Scheduler`.
        max_characters: of a text.
        slots: tokens that a segment may come to, voice, text and speech; None: the engine's `max_cache_length`.
        ahead, prefills, reserved: see `kvcache.decoding.Scheduler`.
        one_at_a_time: tokens and audio are computed by turns, audio first; None: on a CPU, whose cores both would divide
            their work among. Elsewhere both run at once.

    Raises:
        InputError, PolicyError: for a value that cannot be.
    """

    max_rows: int = 8
    memory_budget: int | str | None = None
    max_waiting: int = 64
    max_running: int | None = None
    max_characters: int = 20_000
    slots: int | None = None
    ahead: int = 32
    prefills: int = 8
    reserved: int | None = None
    one_at_a_time: bool | None = None

    def __post_init__(self) -> None:
        RowLimits(self.max_rows, self.memory_budget)
        for name in ("max_waiting", "max_running", "max_characters", "slots", "ahead", "prefills"):
            if (value := getattr(self, name)) is not None or name not in ("max_running", "slots"):
                check_count(name, value)
        if self.reserved is not None:
            check_whole("reserved", self.reserved, 0)
        if self.one_at_a_time is not None:
            check_flag("one_at_a_time", self.one_at_a_time)

    @classmethod
    def of(cls, options: "SchedulerOptions | None", given: Mapping[str, Any]) -> "SchedulerOptions":
        """The options that a scheduler's arguments stand for.

        Raises:
            InputError, PolicyError: for an unknown keyword, a value that cannot be, or keywords beside options.
        """
        check_names(given, [one.name for one in fields(cls)], "SpeechScheduler()")
        if options is None:
            return cls(**given)
        if given:
            raise InputError(
                f"SchedulerOptions and {', '.join(given)} are given; put them into the options with dataclasses.replace()"
            )
        return options


class SpeechScheduler(SchedulerFront):
    """Speaks for many clients on one engine, their segments decoded together.

    ``async with SpeechScheduler(engine) as scheduler`` starts and ends its thread; `submit` gives one client's audio.

    Args:
        engine: around a whole Chatterbox model.
        options: for how many clients, and within which limits.
        **fields: or the fields of `SchedulerOptions` as keywords.

    Attributes:
        rows: segments that decode together at most.

    Raises:
        InputError: if the engine decodes one utterance at a time, or has no vocoder.
        CapacityError: if the budget does not hold one row.
    """

    def __init__(
        self, engine: ChatterboxEngine, options: SchedulerOptions | None = None, **fields: Unpack[SchedulerFields]
    ) -> None:
        options = SchedulerOptions.of(options, fields)
        one_at_a_time = options.one_at_a_time
        if one_at_a_time is None:
            one_at_a_time = torch.device(engine.t3.device).type == "cpu"
        self._by_turns = OneAtATime() if one_at_a_time else None
        self._engine = engine
        self._slots, self.rows = engine.room(options.max_rows, options.slots, options.memory_budget)
        self._max_characters = options.max_characters
        self._aside = Aside(engine.prefix_cache)
        self._together = self._shared(None)
        super().__init__(
            Scheduler(
                lambda: engine.batch(self.rows, self._slots),
                self.rows,
                max_waiting=options.max_waiting,
                max_running=options.max_running,
                ahead=options.ahead,
                prefills=options.prefills,
                reserved=options.reserved,
                within=nullcontext if self._by_turns is None else self._by_turns.tokens,
            )
        )

    async def close(self) -> None:
        """End all requests, whose clients are told, and the threads.

        What was computed of voices and is still to be stored is waited for, 2 seconds at most.
        """
        await super().close()
        await asyncio.to_thread(self._aside.flush, _LAST_WRITES)

    def submit(self, text: str | SpeechRequest, **fields: Unpack[RequestFields]) -> Stream[Tensor]:
        """One text's audio in chunks ``[1, samples]``.

        There is room for it when this returns. It is spoken in the voice that is meant now: a name that is given to another
        voice meanwhile, and another voice of the model's own, are for the requests after it; a clip's file is read later. The
        text is divided, tokenized, planned and looked up in another thread. Closing the
        stream, cancelling who waits for it, or forgetting it frees its rows.

        Args:
            text: what to say; or a whole `SpeechRequest`.
            **fields: with a text, how it is spoken; see `SpeechRequest`.

        Raises:
            InputError: if the text has more than `max_characters`, or there is no such request: of a text without words, a
                number out of its range, chunks that cannot be.
            BusyError: if there is no room; its ``retry_after`` says in how many seconds there may be.
            ClosedError: outside ``async with``, in another event loop, or after an error that stayed (see `error`).

        What else cannot be spoken, the stream says in place of its first audio, as `InputError` or `CapacityError`.
        """
        said = text.text if isinstance(text, SpeechRequest) else text
        if isinstance(said, str) and len(said) > self._max_characters:
            raise InputError(
                f"the text has {len(said)} characters, max_characters is {self._max_characters}; send it in parts"
            )
        request = SpeechRequest.of(text, **fields)
        if request.utterance.seed is None:
            request = replace(request, utterance=replace(request.utterance, seed=int(torch.randint(2**31, ()))))
        chosen, rule = self._chosen(request), request.chunking

        def prepare() -> Work[Tensor]:
            who = chosen()
            long = self._engine.long_text(request, who, RowLimits(self.rows), slots=self._slots)
            self._together = self._shared(self._together)  # one thread prepares
            pause, vocoder = request.segmenting.pause, self._together
            audio = self._engine.audio(who, request.watermark, long, chunking=rule, pause=pause, vocoder=vocoder)
            return self._work(long, audio)

        return self._scheduler.submit_prepared(prepare, size=rule.step, alone=rule.opening)

    def _shared(self, before: Together | None) -> Together:
        """The one vocoder of all streams: that of `before`, unless the model has another by now."""
        vocoder = self._engine.vocoder
        if before is not None and before.vocoder is vocoder:
            return before
        within = nullcontext if self._by_turns is None else self._by_turns.audio
        return Together(vocoder, most_together(self._engine.t3.device), within=within)

    def _chosen(self, request: SpeechRequest) -> Callable[[], Voice]:
        """Who speaks, as of now; that there is no such voice is said by the call, and so by the stream."""
        try:
            return self._engine.chosen_voice(request.voice, request.audio_prompt_path)
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
            ends = chunk.last and chunk.index == last
            parts = [audio.push(chunk.index, chunk.tokens, seconds(chunk), ends)]
            if ends:
                parts.append(audio.finish())
            return (part for part in parts if part.numel())

        return Work(len(long.utterances), job, heard, sequence=long.carry is not None, close=audio.close)
