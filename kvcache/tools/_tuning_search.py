"""How `kvcache tune` searches: the best of many settings, found by measuring few of them.

What is chosen between is a `Space` of axes: back end (and with it the kind of cache), precision, dtype or bits of the cache,
requests that decode together, and bucket sizes of graphs. The search goes along one axis after another and keeps the best
value; what loses clearly is not looked at again. Compiling takes longest, so it is left to the end: only what came close to
the best without it is compiled. Those that lie close together at the end are measured again, longer and in turn, until none is
left that could be faster; of those that cannot be told apart then, the simplest is taken.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from kvcache.decoding import Backend, Setting, Trial, dtype_name
from kvcache.errors import InputError, KVCacheError
from kvcache.models import Precision

AXES = ("backend", "requests", "precision", "kv_dtype", "quantization", "bucket")
"""In the order in which they are searched."""

_NAMES = {
    "backend": "back end",
    "requests": "requests together",
    "precision": "precision",
    "kv_dtype": "dtype of the engine's cache",
    "quantization": "bits of the growing cache",
    "bucket": "bucket of graphs",
}
_COMPILED = ("compile", "graph+compile")
_FEW, _MANY = 24, 64  # tokens that are timed: to drop what is clearly beaten, and to tell apart what is close
_CLEARLY = 1.25  # times the best: beaten, and not looked at again
_HOPELESS = 2.0  # times the best: with this back end nothing else is tried
_CLOSE = 1.06  # times the best: measured again
_FINALISTS = 3
_COMPILING = 60.0  # seconds that a first compilation is expected to take


@dataclass(frozen=True)
class Refusal:
    """A value of an axis that cannot be chosen, and why."""

    axis: str
    value: str
    reason: str


@dataclass(frozen=True)
class Space:
    """All settings that are chosen between; the first value of each axis is where the search begins.

    Attributes:
        backend, requests, precision, kv_dtype, quantization, bucket: the values of each axis, see `Setting`.
        alone: back ends that decode one request at a time.
        refused: values that are not in it, with reasons.
    """

    backend: tuple[Backend, ...]
    requests: tuple[int, ...] = (1,)
    precision: tuple[Precision | None, ...] = (None,)
    kv_dtype: tuple[torch.dtype | None, ...] = (None,)
    quantization: tuple[int | None, ...] = (None,)
    bucket: tuple[int | None, ...] = (None,)
    alone: frozenset[Backend] = frozenset()
    refused: tuple[Refusal, ...] = ()

    def values(self, axis: str) -> tuple[Any, ...]:
        """Of an axis."""
        found: tuple[Any, ...] = getattr(self, axis)
        return found

    def settled(self, setting: Setting) -> Setting:
        """The same setting without what does not matter under its back end."""
        engine, captured = setting.backend != "off", setting.backend in ("graph", "graph+compile")
        return replace(
            setting,
            requests=1 if setting.backend in self.alone else setting.requests,
            kv_dtype=(setting.kv_dtype or self.kv_dtype[0]) if engine else None,
            quantization=None if engine else setting.quantization,
            bucket=(setting.bucket or self.bucket[0]) if captured else None,
        )

    def first(self, backend: Backend | None = None) -> Setting:
        """Where the search begins."""
        values = {axis: self.values(axis)[0] for axis in AXES}
        return self.settled(Setting(**{**values, "backend": backend or self.backend[0]}))

    def settings(self) -> list[Setting]:
        """All of them, each once."""
        found = [Setting()]
        for axis in AXES:
            found = [replace(one, **{axis: value}) for one in found for value in self.values(axis)]
        return list(dict.fromkeys(map(self.settled, found)))


class Bench(Protocol):
    """What settings are measured on."""

    def seconds(self, setting: Setting, tokens: int) -> Sequence[float]:
        """Seconds per token of all requests together, chunk by chunk of about so many tokens of each request.

        What was set up for it stays until it is dropped.

        Raises:
            KVCacheError: if it cannot be run.
        """

    def divergence(self, setting: Setting) -> float:
        """KL(fp32 || this) in nats per token."""

    def nbytes(self, setting: Setting) -> int:
        """Of its cache."""

    def drop(self, setting: Setting) -> None:
        """Let go of what was set up for a setting."""


class Tuner:
    """Looks for the best setting of a space.

    Args:
        space: what there is.
        bench: to measure on.
        bound: of the divergence, in nats per token.
        memory: bytes that the cache may take; None: any.
        time_limit: seconds after which nothing new is tried; None: no limit. What is under way is finished.
        clock: seconds.
        say: is told what was found, line by line.

    Attributes:
        trials: what was looked at so far, by setting.
        untried: what there was no time for.
        tied: what could not be told from the best by its time, and is less simple.
        uncompared: what was as fast at first look, and was not measured again with the best for lack of time.
    """

    def __init__(
        self,
        space: Space,
        bench: Bench,
        *,
        bound: float = math.inf,
        memory: int | None = None,
        time_limit: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.space = space
        self.trials: dict[Setting, Trial] = {}
        self.untried: set[Setting] = set()
        self.tied: tuple[Setting, ...] = ()
        self.uncompared: tuple[Setting, ...] = ()
        self._bench = bench
        self._bound, self._memory = bound, memory
        self._clock, self._say = clock, say
        self._until = math.inf if time_limit is None else clock() + time_limit
        self._samples: dict[Setting, list[float]] = {}
        self._took = {False: 0.0, True: 0.0}  # the longest trial so far, by whether it compiles
        self._held: set[Setting] = set()

    # ------------------------------------------------------------------ two ways to search

    def search(self) -> Setting:
        """The best setting, by looking at few.

        Raises:
            InputError: if none can be run.
        """
        backends = self.space.backend
        steps = [one for one in backends if one not in ("off", *_COMPILED)]
        if steps:
            self._along(self.space.first(steps[0]), steps)
        # The others go on from there: each is a world of its own, whose axes may not be those of the others.
        base = self._best(self.trials) or self.space.first()
        for backend in ("off", *_COMPILED):
            if backend in backends:
                self._along(self.space.settled(replace(base, backend=backend)), [backend])
        return self._decided()

    def sweep(self) -> Setting:
        """The best setting, by looking at all: the reference for `search`, and slow.

        Raises:
            InputError: if none can be run.
        """
        for setting in self.space.settings():
            self._try(setting, _MANY)
        return self._decided()

    def _along(self, start: Setting, backends: Sequence[Backend]) -> None:
        """Look for the best that is reached from a setting by changing one axis at a time, with these back ends."""
        self._try(start)
        best = start
        if (ahead := self._best(self.trials)) is not None and self._cost(start) > _HOPELESS * self._cost(ahead):
            return
        while True:
            before = best
            for axis in AXES:
                worse = 0
                for value in self.space.values(axis):
                    rival = self.space.settled(replace(best, **{axis: value}))
                    if rival in self.trials or rival.backend not in backends or self._hopeless(axis, value, best):
                        continue
                    self._try(rival)
                    # More requests are tried in their order: when two in a row are no gain, further ones will be none.
                    worse = worse + 1 if self._cost(rival) > self._cost(best) else 0
                    if axis == "requests" and worse == 2:
                        break
                near = [self.space.settled(replace(best, **{axis: value})) for value in self.space.values(axis)]
                best = self._best(one for one in near if one.backend in backends) or best
            if best == before:
                return

    def _hopeless(self, axis: str, value: Any, best: Setting) -> bool:
        """Whether this value lost clearly against the best one's wherever nothing else was different."""
        ratios = [
            self._cost(rival) / self._cost(mine)
            for rival, mine in self._pairs(axis, value, getattr(best, axis))
            if rival in self._samples and mine in self._samples
        ]
        return bool(ratios) and min(ratios) > _CLEARLY

    def _pairs(self, axis: str, value: Any, mine: Any) -> Iterator[tuple[Setting, Setting]]:
        """Trials that differ in this axis alone, the one with `value` first."""
        for one in self.trials:
            other = replace(one, **{axis: mine})
            if getattr(one, axis) == value and other in self.trials:
                yield one, other

    def _decided(self) -> Setting:
        """The best of what can be compared: all that was close to it is measured again, in turn, until nothing else is."""
        best = self._best(self.trials)
        if best is None:
            reasons = {trial.refused for trial in self.trials.values() if trial.refused}
            raise InputError(f"no setting can be run: {'; '.join(sorted(reasons)) or 'there was no time for any'}")
        compared: list[Setting] = []
        alike = [best]
        while rivals := self._rivals(best, alike, compared):
            group = [*compared, *rivals]
            if len(group) > 1 and not self._compare(group):
                break
            compared = group
            best = min(compared, key=self._cost)
            alike = [one for one in compared if self._alike(one, best)]
        best = min(alike, key=lambda one: (self._departures(one), self._cost(one)))
        self.tied = tuple(one for one in alike if one != best)
        self.uncompared = tuple(
            one for one in self._ranked() if one not in compared and self._cost(one) < self._cost(best)
        )
        for one in list(self._held):
            self._release(one)
        if self.tied:
            self._say(f"not told apart from {', '.join(map(shown, self.tied))}: the simplest is taken")
        self._say(f"best: {shown(best)}, {1e3 * self._cost(best):.2f} ms a token")
        return best

    def _rivals(self, best: Setting, alike: Sequence[Setting], compared: Sequence[Setting]) -> list[Setting]:
        """What was not compared yet and may be the fastest.

        That is what is close to the best, or to what is like it; and the next best, if that is not clearly beaten. Of what is
        slower no more than a few.
        """
        ranked, slowest = self._ranked(), max(map(self._cost, alike))
        ahead = sum(self._cost(one) <= slowest for one in ranked)
        near = [
            one
            for place, one in enumerate(ranked)
            if self._cost(one) <= max(slowest, (_CLEARLY if place <= 1 else _CLOSE) * self._cost(best))
        ]
        return [one for one in near[: max(_FINALISTS, ahead)] if one not in compared]

    def _compare(self, group: Sequence[Setting]) -> bool:
        """Measure these again, longer and in turn; False if there was no time for all, and nothing of it counts."""
        again: dict[Setting, list[float]] = {one: [] for one in group}
        for _ in range(2):
            for one in group:
                if self._clock() >= self._until:
                    return False
                again[one] += self._bench.seconds(one, _MANY)
                self._held.add(one)
        for one, samples in again.items():
            self._note(one, samples)
        return True

    def _alike(self, one: Setting, best: Setting) -> bool:
        """Whether the difference of two medians is within the spread of what was measured."""
        spreads = [_spread(self._samples[each]) for each in (one, best)]
        return self._cost(one) - self._cost(best) <= math.hypot(*spreads)

    def _departures(self, setting: Setting) -> tuple[int, ...]:
        """How far a setting is from the plainest one: on how many axes, and how far on each."""
        places = [self.space.values(axis).index(self._on(axis, setting)) for axis in AXES]
        return sum(map(bool, places)), *places

    def _on(self, axis: str, setting: Setting) -> Any:
        values = self.space.values(axis)
        return value if (value := getattr(setting, axis)) in values else values[0]  # what its back end has no use for

    # ------------------------------------------------------------------ one setting

    def _try(self, setting: Setting, tokens: int = _FEW) -> None:
        if setting in self.trials:
            return
        compiles, start = setting.backend in _COMPILED, self._clock()
        expected = self._took[compiles] or (_COMPILING if compiles else 0.0)
        # Where nothing has been measured yet, the first is tried whatever it is expected to take.
        if start >= self._until or (start + expected > self._until and self._samples):
            self.untried.add(setting)
            return
        self.untried.discard(setting)
        divergence = None
        try:
            if self._memory is not None and (needed := self._bench.nbytes(setting)) > self._memory:
                raise InputError(f"its cache takes {needed / 2**20:.1f} MiB of {self._memory / 2**20:.1f}")
            if self._bound < math.inf and (divergence := self._bench.divergence(setting)) > self._bound:
                raise InputError(f"it moves what the model says by {divergence:.2g} nats a token, over {self._bound:g}")
            samples = self._bench.seconds(setting, tokens)
        except KVCacheError as error:
            self.trials[setting] = Trial(setting, divergence=divergence, refused=str(error))
            self._say(f"{shown(setting)}: refused, {error}")
            self._bench.drop(setting)
            return
        self.trials[setting] = Trial(setting, divergence=divergence)
        self._note(setting, samples)
        self._took[compiles] = max(self._took[compiles], self._clock() - start)
        self._held.add(setting)
        for one in self._ranked():
            last = self._ranked()[:_FINALISTS]
            if one in self._held and (one not in last or self._cost(one) > _CLEARLY * self._cost(last[0])):
                self._release(one)
        self._say(f"{shown(setting)}: {1e3 * self._cost(setting):.2f} ms a token")

    def _note(self, setting: Setting, samples: Sequence[float]) -> None:
        """What was measured last counts: the first few tokens were only to drop what is clearly beaten."""
        self._samples[setting] = list(samples)
        self.trials[setting] = replace(
            self.trials[setting], milliseconds=1e3 * statistics.median(samples), chunks=len(samples)
        )

    def _release(self, setting: Setting) -> None:
        self._held.discard(setting)
        self._bench.drop(setting)

    def _cost(self, setting: Setting) -> float:
        samples = self._samples.get(setting)
        return math.inf if samples is None else statistics.median(samples)

    def _ranked(self) -> list[Setting]:
        return sorted(self._samples, key=self._cost)

    def _best(self, settings: Iterable[Setting]) -> Setting | None:
        return min((one for one in settings if one in self._samples), key=self._cost, default=None)

    # ------------------------------------------------------------------ in plain words

    def explanation(self, best: Setting) -> tuple[str, ...]:
        """A line for each axis: what was chosen, what the others would cost, what was refused and why."""
        return tuple(self._explained(axis, best) for axis in AXES)

    def _explained(self, axis: str, best: Setting) -> str:
        mine = getattr(best, axis)
        others, said = [value for value in self.space.values(axis) if value != mine], []
        for value in others:
            name = _value(axis, value)
            pairs = [pair for pair in self._pairs(axis, value, mine) if all(one in self._samples for one in pair)]
            at_all = self._best(one for one in self.trials if getattr(one, axis) == value)
            refused = [one for one in self.trials.values() if getattr(one.setting, axis) == value and one.refused]
            if pairs:  # the pair that is most like what was chosen
                rival, like = min(pairs, key=lambda pair: _differences(pair[1], best))
                there = "" if like == best else f" (with {_where(axis, like, best)})"
                said.append(f"{name} takes {self._cost(rival) / self._cost(like):.2f}x as long{there}")
            elif at_all is not None:
                said.append(f"{name} at its best takes {self._cost(at_all) / self._cost(best):.2f}x as long")
            elif refused:
                said.append(f"{name} was refused: {refused[0].refused}")
            elif any(getattr(one, axis) == value for one in self.untried):
                said.append(f"{name} was not tried: no time was left")
            else:
                said.append(f"{name} does not apply to {_value('backend', best.backend)}")
        said += [f"{one.value} is left out: {one.reason}" for one in self.space.refused if one.axis == axis]
        return f"{_NAMES[axis]}: {_value(axis, mine)}; {'; '.join(said) or 'there is no other'}"


def _differences(one: Setting, other: Setting) -> int:
    return sum(getattr(one, axis) != getattr(other, axis) for axis in AXES)


def _where(axis: str, one: Setting, best: Setting) -> str:
    """In what a setting differs from the best, apart from an axis."""
    names = [name for name in AXES if name != axis and getattr(one, name) != getattr(best, name)]
    return ", ".join(f"{_NAMES[name]} {_value(name, getattr(one, name))}" for name in names)


def _value(axis: str, value: Any) -> str:
    """A value of an axis for people."""
    if axis == "kv_dtype":
        return dtype_name(value) or "its own"
    if axis == "backend" and value == "off":
        return "off (the token loop)"
    if value is None:
        return {"precision": "as loaded", "quantization": "full precision"}.get(axis, "none")
    return str(value)


def _spread(samples: Sequence[float]) -> float:
    """The standard error of a median, by the quartiles.

    That is 1.25 standard deviations over the root of the number; the quartiles are 1.35 of them apart.
    """
    if len(samples) < 4:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4)
    return float(1.25 * (high - low) / 1.35 / math.sqrt(len(samples)))


def shown(setting: Setting) -> str:
    """A setting in one line."""
    said = {
        "requests": "requests {}",
        "kv_dtype": "cache {}",
        "quantization": "cache of {} bits",
        "bucket": "bucket {}",
    }
    values = ((axis, getattr(setting, axis)) for axis in AXES)
    return ", ".join(said.get(axis, "{}").format(_value(axis, value)) for axis, value in values if value is not None)
