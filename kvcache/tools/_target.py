"""A model that the commands know by its name, and that model set up to decode in one way."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from kvcache.cache import CacheGeometry, CacheReport
from kvcache.decoding import Setting, Told, WarmUp
from kvcache.errors import InputError
from kvcache.models import geometry_of
from kvcache.tools._footprint import Footprint


class Prepared(Protocol):
    """A model that is set up to decode in one way, as often as asked."""

    @property
    def module(self) -> nn.Module:
        """What runs at each step, so that its layers can be watched."""

    def stream(self, context: int, tokens: int, chunk_size: int = 16) -> Iterator[int]:
        """Decode `tokens` tokens for every request behind `context` tokens of it.

        Yields how many tokens of all requests came, chunk by chunk. The first chunk waits for the prefill. Nothing ends it early.
        """

    def run(self, context: int, tokens: int) -> None:
        """The same at once and in this thread, for tools that look at one thread only."""

    def vocode(self, tokens: int) -> Mapping[str, float] | None:
        """Make audio of so many made-up tokens, chunk by chunk; None if the model does not speak.

        Returns:
            Seconds of the parts that can be told apart, by their names in `kvcache.tools._module_timer.AUDIO`.
        """

    @property
    def vocoder(self) -> nn.Module | None:
        """All that makes the audio, where that has weights: as loaded, and what is made of it to run."""

    @property
    def kept(self) -> int:
        """Bytes of prefixes, such as voices, that wait in memory for the next request."""

    def logits(self, ids: Tensor) -> Tensor:
        """The logits ``[n, vocabulary]`` after each of these tokens ``[n]``, at this precision, to judge fidelity by.

        At least the second half goes through a cache as the setting has it.
        """

    def report(self) -> CacheReport:
        """The account of the last run's cache."""

    def release(self) -> None:
        """Let go of caches and of what was compiled or captured."""


class ModelTarget(ABC):
    """A model that the commands know by name.

    Attributes:
        name: as it was given.
        rows: cache rows of a request; 2 under guidance.
        shortest: the fewest tokens of context that a request has.
        quantizes: whether its token loop can hold its cache in few bits.
        batches_off: whether several requests can decode together without the decode engine.
        random: whether its weights are made up, for their shapes and speed alone.
        speaks: whether it is part of a model that speaks.
    """

    name: str
    rows: int = 1
    shortest: int = 1
    quantizes: bool = True
    batches_off: bool = True
    random: bool = False
    speaks: bool = False

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The model without its weights, on the meta device, in the dtype it is loaded in."""

    @abstractmethod
    def decoder(self, model: nn.Module) -> nn.Module:
        """The part of a model that has the cache: a transformers decoder, with a config."""

    @abstractmethod
    def load(self, device: str = "cpu") -> nn.Module:
        """The model with its weights; loaded once."""

    @abstractmethod
    def prepared(self, setting: Setting, device: str = "cpu") -> Prepared:
        """The loaded model, set up to decode so.

        Raises:
            KVCacheError: if it cannot.
        """

    @abstractmethod
    def warm_up(self, setting: Setting, context: int, tokens: int, told: Told) -> WarmUp:
        """Do on a CPU what the first request of the loaded model would wait for.

        Args:
            setting: how it decodes.
            context: tokens of a request before those that it makes.
            tokens: that it makes at most.
            told: is told what is done next.

        Raises:
            KVCacheError: if it cannot decode so.
        """

    def sample(self, tokens: int) -> tuple[Tensor, str | None]:
        """Token ids ``[tokens]`` to judge fidelity on, and what else must be known to read that judgement, if anything."""
        return torch.randint(1, 200, (tokens,), generator=torch.Generator().manual_seed(0)), "judged on made-up tokens"

    def longest(self, setting: Setting) -> int | None:
        """The most tokens that a request can have; None where nothing says."""
        return setting.max_length

    @abstractmethod
    def footprint(self, setting: Setting, context: int, tokens: int, device: str) -> Footprint:
        """What requests that decode so would take on ``"cpu"`` or ``"cuda"``, without any weights.

        Args:
            setting: how they decode.
            context: tokens of a request before those it makes.
            tokens: that it makes.
            device: what is planned for; it need not be there.

        Raises:
            KVCacheError: if they cannot.
        """

    @cached_property
    def blank(self) -> nn.Module:
        """The skeleton, made once; not to be changed."""
        return self.skeleton()

    def geometry(self, setting: Setting | None = None) -> CacheGeometry:  # noqa: ARG002  # others need it
        """Of its cache, in the dtype that a setting gives it."""
        return geometry_of(self.decoder(self.skeleton()))


def check_vocoder(subject: ModelTarget, setting: Setting) -> None:
    """Raise `InputError` if a vocoder is asked for of a model that does not speak."""
    if setting.vocoder is not None and not subject.speaks:
        raise InputError(f"{subject.name} is no model that speaks, and has no vocoder; leave the vocoder out")
