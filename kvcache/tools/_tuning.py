"""Autotuning: which way to decode is the fastest for a model on this machine; `kvcache tune` and the profile it saves.

`kvcache.tools._tuning_search` says how few settings are looked at; here is what there is to choose from, and how it is measured.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvcache.cache import CacheShape, CacheSpec, KVQuantization, bytes_of
from kvcache.decoding import (
    BUCKET,
    Backend,
    Goal,
    Setting,
    Trial,
    TuningProfile,
    VocoderSetting,
    VocoderTrial,
    kernel_reason,
    machine,
    versions,
)
from kvcache.errors import InputError, KVCacheError
from kvcache.models import (
    Precision,
    check_precision,
    has_half,
    model_fingerprint,
    model_outline,
    quantize_linear,
    shape_of,
)
from kvcache.tools._targets import ModelTarget, Prepared, check_vocoder
from kvcache.tools._tuning_search import Bench, Refusal, Space, Tuner, shown
from kvcache.tools._tuning_vocoder import tuned_vocoder

__all__ = [
    "Bench",
    "Goal",
    "Refusal",
    "Setting",
    "Space",
    "SubjectBench",
    "Trial",
    "Tuned",
    "Tuner",
    "TuningProfile",
    "shown",
    "space_of",
    "tune",
]

_CHUNK = 8  # tokens
_SAMPLE = 48  # tokens that fidelity is judged on
_GROUPS = (
    4  # groups of a cache in few bits that it is judged on: until its first is full, such a cache holds all in full
)
_FAR_SLOWER = 4.0  # times fp32: kernels that are there in name only


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


def tune(
    subject: ModelTarget,
    goal: Goal = "latency",
    *,
    context: int | None = None,
    time_limit: float | None = 300.0,
    bound: float = 0.03,
    max_requests: int = 8,
    memory: int | None = None,
    device: str = "cpu",
    exhaustive: bool = False,
    space: Space | None = None,
    vocoder: VocoderSetting | None = None,
    change_sound: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Find the fastest setting of a model on this machine.

    Args:
        subject: which model.
        goal: ``"latency"``: milliseconds of a token of one request. ``"throughput"``: tokens of all requests together.
        context: tokens of each request before those that are timed; by default 256, or as few as a request can have.
        time_limit: seconds after which nothing new is tried; what is under way is finished. None: no limit.
        bound: how far a setting may move what the model says: KL(fp32 || setting) in nats per token.
        max_requests: that may decode together, for throughput.
        memory: bytes that the cache may take; None: any.
        device: where.
        exhaustive: measure all settings, not few.
        space: what to choose between; by default all that `space_of` finds.
        vocoder: tune what makes audio of the tokens, too, and keep of it what this says; None leaves it as it is.
        change_sound: try the vocoder in fewer bits, which changes the sound.
        say: is told what was found, line by line.

    Raises:
        InputError: for a request that cannot be, or if no setting can be run.
    """
    context = max(256, subject.shortest + 30) if context is None else context
    for name, count, least in (("context", context, subject.shortest), ("max_requests", max_requests, 1)):
        if count < least:
            raise InputError(f"{name}={count} must be at least {least} for {subject.name}")
    if math.isnan(bound) or bound < 0 or (time_limit is not None and not time_limit > 0):
        raise InputError(
            f"fidelity {bound:g} must be at least 0 nats a token, and the time limit {time_limit} above 0 seconds"
        )
    check_vocoder(subject, Setting(vocoder=vocoder))
    start = time.monotonic()
    if space is None:
        space = space_of(subject, goal, max_requests, device, context)
    bench = SubjectBench(subject, context, device)
    tuner = Tuner(
        space,
        bench,
        bound=bound,
        memory=memory,
        time_limit=None if time_limit is None else max(0.0, time_limit - (time.monotonic() - start)),
        say=say,
    )
    best = tuner.sweep() if exhaustive else tuner.search()
    spoken: tuple[VocoderTrial, ...] = ()
    said: tuple[str, ...] = ()
    if vocoder is not None:
        until = None if time_limit is None else start + time_limit
        vocoder, spoken, said = tuned_vocoder(
            subject, best, vocoder, device=device, change_sound=change_sound, until=until, say=say
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
        bound=min(bound, 1e9),
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


def space_of(
    subject: ModelTarget,
    goal: Goal = "latency",
    max_requests: int = 8,
    device: str = "cpu",
    context: int | None = None,
) -> Space:
    """All that there is to choose from for a model on a device, and what there is not, with reasons.

    Args:
        subject, goal, max_requests, device, context: see `tune`.
    """
    model = subject.load(device)
    weight = next(subject.decoder(model).parameters())
    cpu = weight.device.type == "cpu"
    refused: list[Refusal] = []

    backends: list[Backend] = ["eager", "off", "compile"]
    if cpu:
        why = "there are no graphs on a CPU; what it has is a trace, which shows that a step can be captured and is no faster"
        refused += [Refusal("backend", name, why) for name in ("graph", "graph+compile")]
    else:
        backends += ["graph", "graph+compile"]

    precisions: list[Precision | None] = []
    if cpu and weight.dtype != torch.float32:
        precisions = [None]
        why = f"the model is loaded in {weight.dtype}, and on a CPU fewer bits start from fp32"
        refused.append(Refusal("precision", "bf16, fp16, int8", why))
    else:
        for precision in ("fp32", "bf16", "fp16", "int8"):
            try:
                check_precision(precision, weight.device)
                _check_kernels(precision, weight)
                precisions.append(precision)
            except InputError as error:
                refused.append(Refusal("precision", precision, str(error)))

    kv_dtypes: tuple[torch.dtype | None, ...] = (None,)
    if not cpu:
        kv_dtypes = (None, torch.bfloat16)
    elif weight.dtype == torch.float32 and has_half("bf16"):
        kv_dtypes = (torch.float32, torch.bfloat16)
    else:
        refused.append(Refusal("kv_dtype", "bf16", "this CPU has no fast bf16, or the model is not in fp32"))

    bits: list[int | None] = [None]
    if (unsupported_reason := _why_no_bits(subject, device, context)) is None:
        bits += [8, 4]
    else:
        refused.append(Refusal("quantization", "8, 4", unsupported_reason))

    buckets: tuple[int | None, ...] = (None,)
    if cpu:
        refused.append(Refusal("bucket", "all", "nothing is captured on a CPU"))
    elif kernel_reason(weight.device) is None:
        refused.append(
            Refusal("bucket", "all", "the kernel reads by length, so that one recording serves every length")
        )
    else:
        buckets = (BUCKET, BUCKET // 2, BUCKET * 2)

    requests = [1]
    while goal == "throughput" and requests[-1] * 2 <= max_requests:
        requests.append(requests[-1] * 2)
    if goal == "latency":
        refused.append(Refusal("requests", "more", "latency is that of one request"))
    alone: frozenset[Backend] = frozenset() if subject.batches_off else frozenset({"off"})
    return Space(
        tuple(backends), tuple(requests), tuple(precisions), kv_dtypes, tuple(bits), buckets, alone, tuple(refused)
    )


def _why_no_bits(subject: ModelTarget, device: str, context: int | None) -> str | None:
    """Why fewer bits would change nothing of a cache; None if they would."""
    if not subject.quantizes:
        return "this model's loop has no quantized caches"
    shape = shape_of(subject.decoder(subject.load(device)))
    if not any(layer.managed and layer.token is not None for layer in shape.layers):
        return "no layer of this model's cache is held in few bits: each is kept the model's own way"
    if context is not None and context < 2 * (KVQuantization(8).group_size or 0):
        return f"behind {context} tokens hardly any are held in few bits: they are in groups of {KVQuantization(8).group_size}"
    return None


def _check_kernels(precision: Precision, weight: Tensor) -> None:
    """Refuse a precision whose kernels this processor has in name only: a whole model on them would take minutes to try.

    Raises:
        InputError: with how much slower a layer is.
    """
    if weight.device.type != "cpu" or precision == "fp32":
        return
    plain = nn.Linear(512, 512)
    layer = quantize_linear(nn.Sequential(plain), precision)
    states = torch.randn(4, 512)
    with torch.inference_mode():
        ratio = _quickest(layer, states) / _quickest(plain, states)
    if ratio > _FAR_SLOWER:
        raise InputError(f"a layer in {precision} takes {ratio:.0f}x as long as in fp32 on this processor")


def _quickest(layer: nn.Module, states: Tensor) -> float:
    """Seconds of the quickest of some calls."""
    found = math.inf
    for _ in range(5):
        start = time.perf_counter()
        layer(states)
        found = min(found, time.perf_counter() - start)
    return found


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
