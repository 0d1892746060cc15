"""What profiling finds: where a step's time and a process's memory go, and what any cache could save of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvcache.decoding import Setting
from kvcache.tools._module_timer import AUDIO, PARTS

MEMORY: Mapping[str, str] = {
    "attention_weights": "weights: attention",
    "mlp_weights": "weights: MLP",
    "embedding_weights": "weights: embeddings and heads",
    "other_weights": "weights: everything else of the model",
    "unused_weights": "weights as loaded, which this precision does not read",
    "vocoder_weights": "weights: vocoder",
    "kv_cache": "KV cache",
    "prefixes": "KV of prefixes and voices that are kept",
    "activations": "activations at the peak of a step",
    "rest": "the rest: Python, libraries, what allocators keep",
}
"""The parts of the memory, and what is in them."""


@dataclass(frozen=True)
class Times:
    """What a step, or a prefill, takes.

    Attributes:
        parts: seconds of each of `PARTS`, as the clock inside the model tells them apart.
        wall: seconds as they were measured from outside, in the same run.
    """

    parts: Mapping[str, float]
    wall: float

    @property
    def total(self) -> float:
        """The sum of the parts, in seconds."""
        return sum(self.parts.values())

    def share(self, *names: str) -> float:
        """Of the total, between 0 and 1."""
        return sum(self.parts[name] for name in names) / self.total


@dataclass(frozen=True)
class Memory:
    """What decoding holds.

    Attributes:
        parts: bytes of each of `MEMORY`. They add up to the total.
        total: bytes that the process has of the machine's memory (its resident set), or that torch has reserved of a GPU's.
        prefill: bytes that a prefill takes at its peak beside the weights and what it leaves in the cache.
        reserved: bytes of the cache with the slots that no token has been written to. On a CPU the system gives memory
            only to what has been.
        before: bytes that the process had when `profile` began; the weights are in it if the model was loaded already.
    """

    parts: Mapping[str, int]
    total: int
    prefill: int
    reserved: int
    before: int

    def share(self, *names: str) -> float:
        """Of the total, between 0 and 1."""
        return sum(self.parts[name] for name in names) / self.total


@dataclass(frozen=True)
class Profile:
    """Where time and memory go.

    Attributes:
        model: its name.
        setting: how it decodes.
        device: where.
        threads: of torch.
        context: tokens before the first that is decoded.
        tokens: that were decoded in each round.
        step: what a step takes; on a compiled or captured backend, the eager step that does the same.
        prefill: what comes before the first token.
        plain: seconds of the same step while nobody watches.
        asked: seconds of a step on the backend that was asked for; as `plain` where that can be watched itself.
        memory: what is held.
        notes: what is to be known of the figures.
    """

    model: str
    setting: Setting
    device: str
    threads: int
    context: int
    tokens: int
    step: Times
    prefill: Times
    plain: float
    asked: float
    memory: Memory
    notes: tuple[str, ...] = ()

    @property
    def overhead(self) -> float:
        """What watching adds to a step, as a share of the plain one."""
        return self.step.wall / self.plain - 1

    @property
    def cache_time(self) -> float:
        """The share of a step that a cache could save at most: all that reading and writing it takes."""
        return self.step.share("attention_scores", "cache_update")

    @property
    def cache_memory(self) -> float:
        """The share of the memory that a cache could save at most: all keys and values."""
        return self.memory.share("kv_cache", "prefixes")

    @property
    def best_speedup(self) -> float:
        """How many times faster a step could be at most with a perfect cache (Amdahl's law)."""
        return 1 / (1 - self.cache_time)

    @property
    def outside_time(self) -> float:
        """The share of a step that is neither attention nor its cache."""
        return 1 - self.step.share("attention_products", "attention_scores", "cache_update")

    @property
    def outside_memory(self) -> float:
        """The share of the memory that is neither attention's weights nor keys and values."""
        return 1 - self.memory.share("attention_weights", "kv_cache", "prefixes")

    def sentences(self) -> list[str]:
        """What the figures say, in plain words."""
        said = [
            f"Outside attention and its cache are {self.outside_time:.1%} of a step's time and "
            f"{self.outside_memory:.1%} of the memory.",
            f"A perfect cache, free to write and to read, would save {self.cache_time:.1%} of a step (at most "
            f"{self.best_speedup:.2f}×) and {self.cache_memory:.1%} of the memory: no setting of the KV cache can save more.",
            self._prefix(),
        ]
        if audio := self.step.share(*AUDIO):
            told = ", ".join(
                f"{self.step.share(part):.1%} {PARTS[part].removeprefix('vocoder: ')}"
                for part in AUDIO
                if self.step.parts[part]
            )
            said.append(f"Audio is {audio:.1%} of what a token takes ({told}).")
        said.append(
            f"The parts add up to {self.step.total / self.step.wall:.1%} of the time measured from outside; being watched "
            f"made a step {self.overhead:+.1%} longer."
        )
        return [*said, *self.notes]

    def _prefix(self) -> str:
        """What a known beginning could save."""
        takes = f"{shown_seconds(self.prefill.wall)}, as long as {self.prefill.wall / self.asked:.1f} steps"
        if self.memory.parts["prefixes"]:
            return (
                f"The prefill runs behind a beginning that is known already, such as a voice: it takes {takes}, for what is "
                "each request's own."
            )
        return f"A prefix that is known saves at most the prefill: {takes}."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words: seconds, bytes, shares between 0 and 1."""
        setting = {name: value for name, value in asdict(self.setting).items() if value is not None}
        setting = {name: value if isinstance(value, int | str) else repr(value) for name, value in setting.items()}
        found = {**asdict(self), "setting": setting, "notes": list(self.notes)}
        for name in ("overhead", "cache_time", "cache_memory", "best_speedup", "outside_time", "outside_memory"):
            found[name] = getattr(self, name)
        for name, times in (("step", self.step), ("prefill", self.prefill)):
            found[name] |= {"total": times.total, "shares": {part: times.share(part) for part in times.parts}}
        found["memory"]["shares"] = {part: self.memory.share(part) for part in self.memory.parts}
        return {**found, "sentences": self.sentences()}


def shown_seconds(seconds: float) -> str:
    """For people: ``1.2 s``, ``34.5 ms``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
