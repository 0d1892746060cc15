"""Planning memory: what a model takes while it serves, to the byte where bytes can be known, before anything is loaded."""

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvcache.decoding import Setting
from kvcache.errors import InputError
from kvcache.memory import resident_bytes
from kvcache.models import PackedLinear, Precision, meta_without_autocast, onednn_linear
from kvcache.tools._footprint import Moment, Weights, bytes_in, weights_of
from kvcache.tools._target import ModelTarget, check_vocoder

Device = Literal["cpu", "cuda"]

_WIDTH = 1024  # of the layer that kernels are tried on: large enough for the buffers that they keep
MOST_REQUESTS = 1024
"""More than so many are not planned together: a process that decodes them has long been bound by something else."""

_UNBOUNDED = 2**20  # tokens to which a length is searched where the model names no limit


@dataclass(frozen=True)
class MemoryPlan:
    """What a process that serves a model holds at most, in bytes. Loading the model may take more for a moment.

    Attributes:
        model: its name.
        device: what is planned for.
        requests: that decode together.
        length: tokens of each, in the end.
        context: those of them that it begins with.
        kv: bytes that the caches hold in the end, exactly as their report says. On a CPU memory counts less: what has been
            written to.
        weights: by what they are for.
        prefixes: what is known of voices.
        moments: what else is held, at the moments at which it may be most.
        process: Python and its libraries; None where it is not part of the device's memory, or the system does not tell.
        fallback: why the requests are not decoded as asked; None if they are.
        vocoder: weights of what makes audio of the tokens, all that it holds; 0 where it was not asked for.
    """

    model: str
    device: Device
    requests: int
    length: int
    context: int
    kv: int
    weights: Weights
    prefixes: int
    moments: tuple[Moment, ...]
    process: int | None
    fallback: str | None = None
    vocoder: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What the total is made of, by name."""
        # On a CPU, what a prefill has let go of stays with the process: the C library keeps it, in pieces between what is
        # still held. It serves the activations of later steps; the engine's cache, which the system hands out page by page,
        # and its buffers, which are longer than the pieces, come on top. On a GPU one allocator serves all of them.
        if self.device == "cpu":
            peak = max(self.moments, key=lambda one: one.growing + one.workspace)
            static, engine = (max(getattr(one, name) for one in self.moments) for name in ("static", "engine"))
        else:
            peak = max(self.moments, key=lambda one: one.growing + one.static + one.engine + one.workspace)
            static, engine = peak.static, peak.engine
        decodes_on_it = any(one.static for one in self.moments)
        return {
            "process": self.process or 0,
            "attention weights": self.weights.attention,
            "MLP weights": self.weights.mlp,
            "embeddings and head": self.weights.embeddings,
            "other weights": self.weights.other,
            "weights as loaded": self.weights.originals,
            "vocoder weights": self.vocoder,
            "voices": self.prefixes,
            "KV cache": static if decodes_on_it else peak.growing,
            "prefill's KV cache": peak.growing if decodes_on_it else 0,
            "engine's buffers": engine,
            "workspace": peak.workspace,
        }

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        return {**asdict(self), "parts": self.parts, "total": self.total}


@dataclass(frozen=True)
class Room:
    """What an amount of memory has room for.

    Attributes:
        memory: bytes.
        fits: whether what was planned fits.
        requests: how many requests of this length would; 0 if none does.
        or_more: whether it may be more: so many are the most that is looked at, `MOST_REQUESTS`.
        length: how long each of so many requests may be; 0 if not even the shortest fits.
        longest: whether that is the most that the model can do anyway.
        alone: where neither fits, how long a single request may be; 0 if not even the shortest.
    """

    memory: int
    fits: bool
    requests: int
    or_more: bool
    length: int
    longest: bool
    alone: int


def process_bytes(precision: Precision | None = None) -> int | None:
    """Bytes that this process holds of Python and its libraries, if it holds no model; None where the system does not tell.

    Each kind of kernel runs once before, as its code is read from disk, or made, at its first use, and stays from then on.

    Args:
        precision: of the linear layers that the kernels shall be those of.
    """
    _run_kernels(precision)
    return resident_bytes()


@torch.inference_mode()
def _run_kernels(precision: Precision | None) -> None:
    linear = nn.Linear(_WIDTH, _WIDTH)
    layers: list[Callable[[Tensor], Tensor]] = [linear, lambda x: torch.addmm(linear.bias, x, linear.weight)]
    if precision not in (None, "fp32"):
        layers.append(PackedLinear([linear], precision))
    for rows in (1, 64):
        states = torch.zeros(rows, _WIDTH)
        with onednn_linear(linear):
            for layer in layers:
                states = layer(states)
        heads = states.view(1, rows, -1, 64).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        F.silu(F.gelu(states, approximate="tanh"))
        ordered, _ = states.sort()
        ordered.softmax(-1).cumsum(-1).exponential_().argmax(-1)


def plan(
    subject: ModelTarget,
    setting: Setting,
    length: int,
    *,
    context: int | None = None,
    device: Device = "cpu",
    process: int | None = None,
    keep_loaded: bool = True,
) -> MemoryPlan:
    """What requests on a model take, found without its weights.

    Args:
        subject: the model, see `kvcache.tools.subject`.
        setting: how it decodes, and how many requests together.
        length: tokens of a request, in the end.
        context: those of them that it begins with; by default half, but no fewer than it must have.
        device: ``"cpu"`` or ``"cuda"``; it need not be there.
        process: bytes of Python and its libraries; by default what this process holds, which has imported the same. Give it
            where this process holds a model. On a GPU it does not count.
        keep_loaded: whether the model as it was loaded is kept beside the layers that decode in fewer bits.

    Raises:
        InputError: if the length has no room for a request.
        KVCacheError: if such requests cannot be decoded.
    """
    if setting.requests < 1:
        raise InputError(f"requests={setting.requests} must be at least 1")
    if setting.requests > MOST_REQUESTS:
        raise InputError(
            f"requests={setting.requests}: up to {MOST_REQUESTS} are planned together; give at most as many"
        )
    least = subject.shortest + 1
    if length < least:
        raise InputError(
            f"length={length} must be at least {least}: {subject.shortest} of context, and a token to make"
        )
    most = subject.longest(setting)
    if most is not None and length > most:
        raise InputError(f"length={length}: {subject.name} goes up to {most} tokens; give at most as many")
    if context is None:
        context = min(length - 1, max(subject.shortest, length // 2))
    if not subject.shortest <= context < length:
        raise InputError(f"context={context}: give from {subject.shortest} to {length - 1}, one less than the length")
    check_vocoder(subject, setting)
    with meta_without_autocast():
        footprint = subject.footprint(setting, context, length - context, device)
    speaks, moments, prefixes = footprint.vocoder, footprint.moments, footprint.prefixes
    if speaks is not None:  # it runs between two steps, while the caches are held
        moments = (*moments, replace(moments[-1], name="audio", workspace=speaks.workspace))
        prefixes += speaks.voice
    keep_loaded = keep_loaded and device == "cpu"  # elsewhere the copy is the whole model
    return MemoryPlan(
        subject.name,
        device,
        setting.requests,
        length,
        context,
        footprint.kv,
        weights_of(footprint.modules, subject.blank, keep_loaded),
        prefixes,
        moments,
        None if device != "cpu" else process_bytes(setting.precision) if process is None else process,
        footprint.fallback,
        0 if speaks is None else bytes_in(speaks.modules),
    )


def room(
    made: MemoryPlan, memory: int, again: Callable[[int, int], MemoryPlan], shortest: int, longest: int | None
) -> Room:
    """How many requests, and what length, fit into an amount of memory.

    Both are searched by bisection with the whole plan: it grows with either, but for the noise of the sampler, which is
    drawn for fewer steps ahead where requests are many.

    Args:
        made: what was asked for.
        memory: bytes.
        again: plans so many requests of such a length.
        shortest: the least that a length can be.
        longest: the most; None where nothing says.
    """

    def total(requests: int, length: int) -> int:
        try:
            return again(requests, length).total
        except InputError:  # no such requests, as where the token loop runs one at a time
            return sys.maxsize

    one = again(1, made.length)
    # No more than as if each took nothing but the cache of one.
    most = min(MOST_REQUESTS, max(0, memory - one.total) // max(1, one.parts["KV cache"]) + 1)
    requests = _fitting(range(1, most + 1), memory, lambda n: total(n, made.length))
    top = _UNBOUNDED if longest is None else longest

    def fitting(requests: int) -> int:
        """The longest that each of so many can be."""
        count = _fitting(range(shortest, top + 1), memory, lambda n: total(requests, n))
        return shortest + count - 1 if count else 0

    length = fitting(made.requests)
    alone = 0 if requests or length or made.requests == 1 else fitting(1)
    return Room(memory, made.total <= memory, requests, requests == MOST_REQUESTS, length, length == top, alone)


def _fitting(numbers: range, memory: int, total: Callable[[int], int]) -> int:
    """How many of these numbers take no more than that, from the first on; where all do, that takes one look."""
    if numbers and total(numbers[-1]) <= memory:
        return len(numbers)
    return bisect_right(numbers[:-1], memory, key=total)
