"""A side of `end_to_end.py`: a whole Chatterbox with random weights that speaks in one way, timed part by part.

The model is of upstream's own class, around upstream's T3 and S3Gen, with Perth; only the tokenizer is a stand-in, as its
vocabulary comes with the weights. T3 is made to say speech tokens alone and never to end, so that a request is as long as asked.
"""
# Not by `make bench`: a part of end_to_end.py.

import contextlib
import importlib
import io
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processes import Gate, peak_from_here
from s3gen import load
from torch import Tensor
from unending import unending

from kvcache import MemoryStore, SpeakerCache, subscribe
from kvcache.decoding import WarmUp
from kvcache_chatterbox import ChatterboxEngine, load_t3, stand_in
from kvcache_chatterbox.loading import random_conditionals
from kvcache_chatterbox.text import CHARACTERS_PER_SECOND
from kvcache_chatterbox.tools import endless
from kvcache_chatterbox.units import SAMPLE_RATE, SPEECH_TOKENS, TOKENS_PER_SECOND
from kvcache_chatterbox.upstream import upstream_t3
from kvcache_chatterbox.vocoder import Flow, Hift, PlainVocoder, VocoderOptions, random_s3gen
from kvcache_chatterbox.vocoder import _s3gen as parts_of_s3gen
from kvcache_chatterbox.voices import Voice

CLASSES = {
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
    "nano": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
}
TEXT = "The birch canoe slid on the smooth planks, and nobody on the shore saw it go. Glue the sheet to the dark blue background."
PARTS = ("T3", "flow", "HiFT", "watermark")
_EVERYWHERE = 10**9


@dataclass(frozen=True)
class Case:
    """The model.

    Attributes:
        variant: of Chatterbox.
        reference: seconds of the voice's clip.
        layers: of T3; None leaves them all.
    """

    variant: str
    reference: float = 10.0
    layers: int | None = None

    @property
    def distilled(self) -> bool:
        """Whether its own S3Gen has the weights of two steps."""
        return self.variant in ("turbo", "nano")


@dataclass(frozen=True)
class Side:
    """How it speaks.

    Attributes:
        label: in the table.
        upstream: by upstream's own `generate`: all tokens, then all audio.
        vocoder: settings of `VocoderOptions`; None is upstream's `inference`, as it is, for each chunk.
        chunking: of the audio.
        precision, backend: of T3.
        overlap: T3 decodes in a thread of its own, and each of the two has half of the threads.
        onednn: let oneDNN multiply where it is faster.
        whole_hift: HiFT hears all that the flow hears, in place of the context that it needs.
        over: the side from which this one differs in one thing, for levers.
    """

    label: str
    upstream: bool = False
    vocoder: Mapping[str, Any] | None = None
    chunking: str = "auto"
    precision: str = "fp32"
    backend: str = "eager"
    overlap: bool = False
    onednn: bool = True
    whole_hift: bool = False
    over: str | None = None

    @property
    def t3(self) -> str:
        """T3's settings, in words."""
        if self.upstream:
            return "upstream's loop, fp32"
        return (
            f"{self.precision}, {self.backend}"
            + (", in a thread of its own" if self.overlap else "")
            + ("" if self.onednn else ", without oneDNN")
        )

    @property
    def voiced(self) -> str:
        """The vocoder's settings, in words."""
        if self.vocoder is None:
            return "upstream's inference" if self.upstream else "upstream's inference for each chunk"
        words = [spelled(name, value) for name, value in self.vocoder.items()]
        return ", ".join([*words, *(["HiFT over all"] if self.whole_hift else [])]) or "as upstream's"


def spelled(name: str, value: Any) -> str:
    """A setting of `VocoderOptions` in words."""
    if name == "reference_seconds":
        return f"reference of {value:g} s"
    if name in ("compiled", "lookahead"):
        return name if value else f"no {name}"
    return str(value) if name in ("weights", "precision") else f"{name} {value:g}"


# ---------------------------------------------------------------------- who listens


@dataclass(frozen=True)
class Heard:
    """What somebody hears who plays audio as it comes.

    Attributes:
        first: seconds to the first audio.
        silence: seconds without audio behind it.
        longest: of them, the longest at once.
        underruns: how often there was nothing to play.
        audio: seconds of it in all.
    """

    first: float
    silence: float
    longest: float
    underruns: int
    audio: float

    @property
    def waited(self) -> float:
        """Seconds without audio in all, from the request on."""
        return self.first + self.silence


def listen(arrivals: Sequence[tuple[float, float]]) -> Heard:
    """Play audio that comes at these times.

    Args:
        arrivals: seconds since the request, in order, and seconds of audio that came then; at least one.
    """
    first = ends = arrivals[0][0]
    gaps = []
    for at, length in arrivals:
        if at > ends:
            gaps.append(at - ends)
        ends = max(at, ends) + length
    return Heard(first, sum(gaps), max(gaps, default=0.0), len(gaps), sum(length for _, length in arrivals))


# ---------------------------------------------------------------------- the model


class Clock:
    """Seconds spent in parts of the work.

    Attributes:
        spent: by part, since `begin`.
    """

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    def begin(self) -> None:
        """Count from 0."""
        self.spent = Counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += time.perf_counter() - start

        return run

    def timed_pieces(self, part: str, pieces: Iterator[Any]) -> Iterator[Any]:
        """What an iterator gives, whose time is counted."""
        yield from iter(self.timed(part, lambda: next(pieces, None)), None)


class Engine(ChatterboxEngine):
    """Ours, whose T3 is timed, and which tells the vocoder's runs.

    Attributes:
        clock: counts T3's time.
        said: the audio of the last request.
    """

    said: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Clock()

    def _in_order(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Tensor]]:
        return self.clock.timed_pieces("T3", super()._in_order(*args, **kwargs))

    def audio(self, *args: Any, **kwargs: Any) -> Any:
        self.said = super().audio(*args, **kwargs)
        return self.said


class Marker:
    """A watermarker that is timed."""

    def __init__(self, watermarker: Any, clock: Clock) -> None:
        self.apply_watermark = clock.timed("watermark", watermarker.apply_watermark)


def chatterbox(case: Case) -> Any:
    """A whole model of upstream's class.

    Raises:
        SystemExit: if what it imports is not installed.
    """
    upstream_t3().tqdm = lambda steps, **_: steps
    t3 = load_t3(case.variant)  # type: ignore[arg-type]
    if case.layers is not None:
        name = "h" if t3.is_gpt else "layers"
        setattr(t3.tfmr, name, getattr(t3.tfmr, name)[: case.layers])
        t3.cfg.num_hidden_layers = t3.tfmr.config.num_hidden_layers = case.layers
    t3 = endless(t3)
    with torch.no_grad():
        t3.speech_head.bias[SPEECH_TOKENS:] = -1e4
    s3gen, reference = load(t3.is_gpt, "cpu", case.reference)
    name, kind = CLASSES[case.variant]
    module = imported(name)
    conditionals = module.Conditionals(random_conditionals(t3), reference)
    with contextlib.redirect_stdout(io.StringIO()):  # Perth prints
        return getattr(module, kind)(t3, s3gen, None, stand_in(t3).tokenizer, "cpu", conditionals)


def imported(name: str) -> Any:
    """A module of upstream's, with all that it needs.

    Raises:
        SystemExit: if its imports are missing.
    """
    upstream_t3()
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(name)
        if importlib.import_module("perth").PerthImplicitWatermarker is None:
            raise ImportError("perth does not load its watermarker; it needs setuptools<81")
    except (ImportError, OSError) as error:
        raise SystemExit(f"{name} does not load, see docs/chatterbox.md: {error}") from error
    return found


# ---------------------------------------------------------------------- one that speaks


@dataclass
class Run:
    """One request, as it was heard and made.

    Attributes:
        arrivals: seconds since the request, and of audio.
        seconds: until its last audio.
        spent: seconds of the parts.
        chunks: speech tokens of the vocoder's runs.
    """

    arrivals: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)


class Speaking:
    """A model that speaks as a side says.

    Args:
        case: the model.
        side: how.

    Attributes:
        clock: of its parts.
    """

    def __init__(self, case: Case, side: Side) -> None:
        self.side, self.clock = side, Clock()
        if side.overlap:
            torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        parts_of_s3gen.CONTEXT = _EVERYWHERE if side.whole_hift else parts_of_s3gen.CONTEXT  # type: ignore[misc]
        self._tts = tts = chatterbox(case)
        self._language = {"language_id": "en"} if tts.t3.hp.is_multilingual else {}
        if tts.t3.hp.is_multilingual:
            unending()
        tts.watermarker = Marker(tts.watermarker, self.clock)
        self._voices = 0
        self._engine: Engine | None = None
        if side.vocoder is None:  # with a clock in its parts, S3Gen is run by its own `inference`
            for part, module in (("flow", tts.s3gen.flow), ("HiFT", tts.s3gen.mel2wav)):
                module.inference = self.clock.timed(part, module.inference)
        else:
            Flow.mels = self.clock.timed("flow", Flow.mels)  # type: ignore[method-assign]
            Flow.reference = self.clock.timed("flow", Flow.reference)  # type: ignore[method-assign]
            Hift.wave = self.clock.timed("HiFT", Hift.wave)  # type: ignore[method-assign]
        if not side.upstream:
            self._engine = engine_of(tts, side)
            self._engine.clock = self.clock
            plain = isinstance(self._engine._with_vocoder().vocoder, PlainVocoder)
            assert plain == (side.vocoder is None), "the vocoder is not run as the side says"
        self.new_voice()

    def new_voice(self) -> None:
        """From here on somebody speaks whom it has not heard yet."""
        self._voices += 1
        conds = self._tts.conds
        conds.t3 = random_conditionals(self._tts.t3, self._voices)
        if self._tts.t3.hp.emotion_adv:
            conds.t3.emotion_adv = 0.5 * torch.ones(1, 1, 1)
        self._voice = Voice.of(self._tts.t3, conds)

    def warm_up(self, tokens: int) -> WarmUp:
        """Do what the first request would wait for."""
        assert self._engine is not None
        return self._engine.warm_up(voice=self._voice, max_new_tokens=tokens)

    def segments(self, text: str) -> int:
        """How many it divides a text into."""
        return 1 if self._engine is None else len(self._engine.plan(text, voice=self._voice, **self._language).segments)

    def say(self, tokens: int, text: str = TEXT, whole: bool = True, divided: bool = False) -> Run:
        """Speak a text, of so many speech tokens in all.

        Args:
            whole: otherwise only until its first audio.
            divided: into segments, where it is long.
        """
        run = Run()
        self.clock.begin()
        start = time.perf_counter()
        audio = self._generated(tokens, text) if self._engine is None else self._streamed(tokens, text, divided)
        for piece in audio:
            run.arrivals.append((time.perf_counter() - start, piece.shape[-1] / SAMPLE_RATE))
            if not whole:
                break
        run.seconds = time.perf_counter() - start
        run.spent = dict(self.clock.spent)
        run.chunks = list(self._engine.said.chunks) if self._engine is not None else [tokens]
        if whole:
            expected = tokens / TOKENS_PER_SECOND
            audio_seconds = sum(length for _, length in run.arrivals)
            assert expected <= audio_seconds < expected + 3, f"{audio_seconds} s were heard, not {expected}"
        return run

    def _streamed(self, tokens: int, text: str, divided: bool) -> Iterator[Tensor]:
        assert self._engine is not None
        segments = self.segments(text) if divided else 1
        return self._engine.generate_stream(
            text,
            voice=self._voice,
            max_new_tokens=-(-tokens // segments),
            chunking=self.side.chunking,  # type: ignore[arg-type]
            seed=0,
            segment_characters=200 if divided else None,
            overlap=self.side.overlap,
            **self._language,
        )

    def _generated(self, tokens: int, text: str) -> Iterator[Tensor]:
        t3 = self._tts.t3
        name, most = ("inference_turbo", "max_gen_len") if t3.is_gpt else ("inference", "max_new_tokens")
        whole = partial(getattr(type(t3), name), t3)
        setattr(t3, name, self.clock.timed("T3", lambda **given: whole(**{**given, most: tokens})))
        torch.manual_seed(0)
        yield self._tts.generate(text, **self._language)
        t3._modules.pop("patched_model", None)  # upstream registers its backbone a second time


SLOTS = 1536  # of a cache that holds the longest request: one compiled step serves all


def engine_of(tts: Any, side: Side) -> Engine:
    """Our engine on a model, with a side's settings; voices are kept in memory alone."""
    settings = dict(side.vocoder or {})
    if settings.get("weights") == "meanflow" and not tts.s3gen.meanflow:
        settings["weights"] = random_s3gen(meanflow=True)
    return Engine(
        tts,
        prefix_cache=SpeakerCache(MemoryStore("1GiB")),
        backend=side.backend,  # type: ignore[arg-type]
        precision=None if side.precision == "fp32" else side.precision,  # type: ignore[arg-type]
        bucket=SLOTS,
        vocoder=VocoderOptions(**settings) if settings else None,
        onednn=side.onednn,
    )


# ---------------------------------------------------------------------- in a process


def begin(gate: Gate, case: Case, side: Side, tokens: int, home: str, warm_up: bool) -> None:
    """The first request of a process, and three more, in its notes: seconds to the first audio.

    Args:
        home: folder in which compiled programs are kept, torch's own among them.
        warm_up: let the engine warm up before; its seconds are in the notes, too.
    """
    os.environ |= {"KVCACHE_HOME": home, "TORCHINDUCTOR_CACHE_DIR": str(Path(home) / "torch")}
    reasons = gate.notes["fell back"] = []
    subscribe(lambda event: reasons.append(str(event)), ["fell_back"])
    speaking = Speaking(case, side)
    gate.notes["warm-up"] = speaking.warm_up(tokens).seconds if warm_up else None
    firsts = [listen(speaking.say(tokens).arrivals).first for _ in range(4)]
    gate.notes |= {"first": firsts[0], "later": firsts[1:]}
    gate()


def serve(gate: Gate, case: Case, side: Side, tokens: int, patience: float) -> None:
    """A side's turns, each a request; what they were like is in its notes.

    It is told how many tokens, or a text. Before the first turn it speaks `tokens` in a new process, and begins once more
    with a new voice; a side whose steps are compiled speaks each text once. A request that takes longer than `patience`
    seconds is not repeated.
    """
    speaking = Speaking(case, side)
    peak_from_here()
    cold = speaking.say(tokens, whole=side.upstream or side.vocoder is not None)
    speaking.new_voice()
    warm = cold if side.upstream else speaking.say(tokens, whole=False)
    gate.notes |= {"cold": listen(cold.arrivals).first, "new voice": listen(warm.arrivals).first, "runs": {}}
    if side.upstream:
        gate.notes["new voice"] = None  # it keeps nothing of voices: each is new
    task: list[tuple[str, int, str | None]] = []

    def told(word: tuple[str, int, str | None]) -> None:
        task[:] = [word]

    gate.told = told
    gate()
    while True:
        key, count, text = task[0]
        if key not in gate.notes["runs"] and text is not None and side.backend == "compile":
            speaking.say(count, text, divided=True)  # its segments have compiled steps of their own
        runs = gate.notes["runs"].setdefault(key, [])
        if not runs or runs[-1]["seconds"] <= patience:
            runs.append(vars(speaking.say(count, text or TEXT, divided=text is not None)))
        gate()


def tokens_of(text: str) -> int:
    """Speech tokens that a text probably takes."""
    return max(TOKENS_PER_SECOND // 2, round(len(text) / CHARACTERS_PER_SECOND * TOKENS_PER_SECOND))
