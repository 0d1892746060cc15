"""Autotuning: which way to decode is the fastest for a model on this machine; `kvcache tune` and the profile it saves.

`kvcache.tools._tuning_search` says how few settings are looked at, and
`kvcache.tools._tuning_space` what there is to choose from; here is how it is measured.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from kvcache.cache import CacheShape, CacheSpec, KVQuantization, bytes_of
from kvcache.decoding import Goal, Setting, TuningProfile, VocoderSetting, VocoderTrial, machine, versions
from kvcache.errors import InputError, KVCacheError
from kvcache.models import Precision, model_fingerprint, model_outline, shape_of
from kvcache.tools._target import ModelTarget, Prepared, check_vocoder
from kvcache.tools._tuning_search import Space, Tuner, shown
from kvcache.tools._tuning_space import space_of
from kvcache.tools._tuning_vocoder import tuned_vocoder

_CHUNK = 8  # tokens
_SAMPLE = 48  # tokens that fidelity is judged on
_GROUPS = (
    4  # groups of a cache in few bits that it is judged on: until its first is full, such a cache holds all in full
)


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        profile: to be saved.
        seconds: that it took.
        best: the time of a token of all requests together, in seconds.
        untried: settings that there was no time for.
        settings: of the whole space.
        note: what must be known to read the fidelity; None if nothing.
    """

    profile: TuningProfile
    seconds: float
    best: float
    untried: int
    settings: int
    note: str | None


class TuneArguments(TypedDict, total=False):
    """The fields of `TuneOptions`, as keyword arguments."""

    context: int | None
    time_limit: float | None
    bound: float
    max_requests: int
    memory: int | None
    device: str
    exhaustive: bool
    vocoder: VocoderSetting | None
    change_sound: bool


@dataclass(frozen=True)
class TuneOptions:
    """How `tune` looks for a setting.

    Attributes:
        context: tokens of each request before those that are timed; by default 256, or as few as a request can have.
        time_limit: seconds after which nothing new is tried; what is under way is finished. None: no limit.
        bound: how far a setting may move what the model says: KL(fp32 || setting) in nats per token.
        max_requests: that may decode together, for throughput.
        memory: bytes that the cache may take; None: any.
        device: where.
        exhaustive: measure all settings, not few.
        vocoder: tune what makes audio of the tokens, too, and keep of it what this says; None leaves it as it is.
        change_sound: try the vocoder in fewer bits, which changes the sound.
    """

    context: int | None = None
    time_limit: float | None = 300.0
    bound: float = 0.03
    max_requests: int = 8
    memory: int | None = None
    device: str = "cpu"
    exhaustive: bool = False
    vocoder: VocoderSetting | None = None
    change_sound: bool = False

    def context_of(self, subject: ModelTarget) -> int:
        """Tokens of each request of a model before those that are timed."""
        return max(256, subject.shortest + 30) if self.context is None else self.context

    def check(self, subject: ModelTarget) -> None:
        """Raise `InputError` for what cannot be looked for with this model."""
        context = self.context_of(subject)
        for name, count, least in (("context", context, subject.shortest), ("max_requests", self.max_requests, 1)):
            if count < least:
                raise InputError(f"{name}={count} must be at least {least} for {subject.name}")
        if math.isnan(self.bound) or self.bound < 0 or (self.time_limit is not None and not self.time_limit > 0):
            raise InputError(
                f"fidelity {self.bound:g} must be at least 0 nats a token, and the time limit {self.time_limit} above 0 seconds"
            )
        check_vocoder(subject, Setting(vocoder=self.vocoder))


def tune(
    subject: ModelTarget,
    goal: Goal = "latency",
    *,
    space: Space | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options: Unpack[TuneArguments],
) -> Tuned:
    """Find the fastest setting of a model on this machine.

    Args:
        subject: which model.
        goal: ``"latency"``: milliseconds of a token of one request. ``"throughput"``: tokens of all requests together.
        space: what to choose between; by default all that `space_of` finds.
        say: is told what was found, line by line.
        **options: the fields of `TuneOptions`.

    Raises:
        InputError: for a request that cannot be, or if no setting can be run.
    """
    asked = TuneOptions(**options)
    asked.check(subject)
    start, context, device = time.monotonic(), asked.context_of(subject), asked.device
    until = None if asked.time_limit is None else start + asked.time_limit
    if space is None:
        space = space_of(subject, goal, asked.max_requests, device, context)
    bench = SubjectBench(subject, context, device)
    tuner = Tuner(
        space,
        bench,
        bound=asked.bound,
        memory=asked.memory,
        time_limit=None if until is None else max(0.0, until - time.monotonic()),
        say=say,
    )
    best = tuner.sweep() if asked.exhaustive else tuner.search()
    vocoder, spoken, said = asked.vocoder, tuple[VocoderTrial, ...](), tuple[str, ...]()
    if vocoder is not None:
        vocoder, spoken, said = tuned_vocoder(
            subject, best, vocoder, device=device, change_sound=asked.change_sound, until=until, say=say
        )
    seconds = time.monotonic() - start
    model = subject.load(device)
    trial = tuner.trials[best]
    assert trial.milliseconds is not None
    profile = TuningProfile(
        name=subject.name,
        model=model_fingerprint(model),
        goal=goal,
        context=context,
        bound=min(asked.bound, 1e9),
        machine=machine(next(model.parameters()).device),
        versions=versions(),
        setting=best,
        trials=tuple(tuner.trials.values()),
        explanation=(*tuner.explanation(best), *_remarks(tuner), *said),
        outline=model_outline(model),
        random=subject.random,
        vocoder=vocoder,
        vocoder_trials=spoken,
    )
    return Tuned(profile, seconds, trial.milliseconds / 1e3, len(tuner.untried), len(space.settings()), bench.note)


def _remarks(tuner: Tuner) -> list[str]:
    """What is to be known of the choice itself."""
    said = []
    if tuner.tied:
        said.append(f"chosen as the simplest of what could not be told apart: {'; '.join(map(shown, tuner.tied))}")
    if tuner.uncompared:
        said.append(
            f"as fast at first look, with no time to measure it again beside the best: {'; '.join(map(shown, tuner.uncompared))}"
        )
    return said


class SubjectBench:
    """Measures settings of a model.

    Args:
        subject: which.
        context: tokens of each request before those that are timed.
        device: where.

    Attributes:
        note: what must be known to read a divergence; None if nothing.
    """

    def __init__(self, subject: ModelTarget, context: int, device: str = "cpu") -> None:
        self._subject = subject
        self._context = context
        self._device = device
        self._prepared: dict[Setting, Prepared] = {}
        self._divergence: dict[Setting, float] = {}
        self._expected: dict[int, Tensor] = {}
        _, self.note = subject.sample(_SAMPLE)

    def seconds(self, setting: Setting, tokens: int) -> list[float]:
        """See `Bench`. The first chunk is not counted: it waits for the prefill, and for what is compiled or captured."""
        try:
            if setting not in self._prepared:
                self._prepared[setting] = self._subject.prepared(setting, self._device)
            prepared, found = self._prepared[setting], []
            start = 0.0
            for chunk in prepared.stream(self._context, tokens + _CHUNK + 1, _CHUNK):
                now = time.perf_counter()
                if start and chunk >= setting.requests * _CHUNK // 2:  # the last one may be a single token
                    found.append((now - start) / chunk)
                # A second chunk of warming up where the first is only what the prefill said.
                start = now if start or chunk >= setting.requests * _CHUNK // 2 else 0.0
        except KVCacheError:
            raise
        except RuntimeError as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"it failed: {said[0]}") from error
        report = prepared.report()
        if report.fallback is not None:
            raise InputError(f"it does not run: {report.fallback}")
        if setting.backend != "off" and report.backend is not None and report.backend != setting.backend:
            raise InputError(f"it does not run: {report.backend} runs instead")
        return found

    def divergence(self, setting: Setting) -> float:
        """See `Bench`. Settings that compute the same are judged once, eagerly."""
        judged = replace(setting, requests=1, bucket=None, backend="off" if setting.backend == "off" else "eager")
        if judged not in self._divergence:
            count = self._judged_on(setting)
            with torch.inference_mode():
                if count not in self._expected:
                    self._expected[count] = self._said(Setting("off", self._widest), count)
                ours, theirs = self._said(judged, count), self._expected[count]
                self._divergence[judged] = max(0.0, float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
        return self._divergence[judged]

    @property
    def _widest(self) -> Precision | None:
        """The precision of the reference."""
        weight = next(self._subject.load(self._device).parameters())
        return None if weight.device.type == "cpu" else "fp32"

    def _judged_on(self, setting: Setting) -> int:
        """Tokens."""
        if setting.quantization is None:
            return _SAMPLE
        wanted = _GROUPS * (KVQuantization(setting.quantization).group_size or 0)
        most = self._subject.longest(setting)
        return wanted if most is None else min(wanted, most)

    def _said(self, setting: Setting, count: int) -> Tensor:
        ids, note = self._subject.sample(count)
        self.note = self.note or note
        prepared = self._subject.prepared(setting, self._device)
        said = prepared.logits(ids).double().log_softmax(-1)
        prepared.release()
        return said

    def nbytes(self, setting: Setting) -> int:
        """See `Bench`: of what the cache holds of as many tokens as are measured, without slots that are free."""
        shape = shape_of(self._subject.decoder(self._subject.load(self._device)))
        rows, tokens = setting.requests * self._subject.rows, self._context + 1
        total = shape.cross * rows * self._context
        for layer in shape.layers:
            if not layer.managed or layer.token is None:
                total += rows * layer.own_bytes(tokens)
            elif setting.quantization is not None:
                held = CacheSpec(storage=KVQuantization(setting.quantization))
                total += held.nbytes(CacheShape((layer,)), tokens, rows=rows)
            else:
                token = layer.token if setting.kv_dtype is None else (*layer.token[:3], setting.kv_dtype)
                total += rows * tokens * sum(bytes_of(token))
        return total

    def drop(self, setting: Setting) -> None:
        """See `Bench`."""
        if (prepared := self._prepared.pop(setting, None)) is not None:
            prepared.release()
