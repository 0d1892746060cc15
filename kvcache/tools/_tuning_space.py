"""What tuning chooses between for a model on a device, and what it does not, with reasons."""

import math
import time

import torch
from torch import Tensor, nn

from kvcache.cache import KVQuantization
from kvcache.decoding import BUCKET, Backend, Goal, kernel_reason
from kvcache.errors import InputError
from kvcache.models import Precision, check_precision, has_half, quantize_linear, shape_of
from kvcache.tools._target import ModelTarget
from kvcache.tools._tuning_search import Refusal, Space

_FAR_SLOWER = 4.0  # times fp32: kernels that are there in name only


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
    weight = next(subject.decoder(subject.load(device)).parameters())
    refused: list[Refusal] = []
    backends = _backends(weight, refused)
    precisions = _precisions(weight, refused)
    kv_dtypes = _kv_dtypes(weight, refused)
    bits: list[int | None] = [None]
    if (why := _why_no_bits(subject, device, context)) is None:
        bits += [8, 4]
    else:
        refused.append(Refusal("quantization", "8, 4", why))
    buckets = _buckets(weight, refused)
    requests = [1]
    while goal == "throughput" and requests[-1] * 2 <= max_requests:
        requests.append(requests[-1] * 2)
    if goal == "latency":
        refused.append(Refusal("requests", "more", "latency is that of one request"))
    alone: frozenset[Backend] = frozenset() if subject.batches_off else frozenset({"off"})
    return Space(backends, tuple(requests), precisions, kv_dtypes, tuple(bits), buckets, alone, tuple(refused))


def _on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu"


def _backends(weight: Tensor, refused: list[Refusal]) -> tuple[Backend, ...]:
    if not _on_cpu(weight):
        return ("eager", "off", "compile", "graph", "graph+compile")
    why = "there are no graphs on a CPU"
    refused += [Refusal("backend", name, why) for name in ("graph", "graph+compile")]
    return ("eager", "off", "compile")


def _precisions(weight: Tensor, refused: list[Refusal]) -> tuple[Precision | None, ...]:
    if _on_cpu(weight) and weight.dtype != torch.float32:
        why = f"the model is loaded in {weight.dtype}, and on a CPU fewer bits start from fp32"
        refused.append(Refusal("precision", "bf16, fp16, int8", why))
        return (None,)
    found: list[Precision | None] = []
    every: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")
    for precision in every:
        try:
            check_precision(precision, weight.device)
            _check_kernels(precision, weight)
            found.append(precision)
        except InputError as error:
            refused.append(Refusal("precision", precision, str(error)))
    return tuple(found)


def _kv_dtypes(weight: Tensor, refused: list[Refusal]) -> tuple[torch.dtype | None, ...]:
    if not _on_cpu(weight):
        return (None, torch.bfloat16)
    if weight.dtype == torch.float32 and has_half("bf16"):
        return (torch.float32, torch.bfloat16)
    refused.append(Refusal("kv_dtype", "bf16", "this CPU has no fast bf16, or the model is not in fp32"))
    return (None,)


def _buckets(weight: Tensor, refused: list[Refusal]) -> tuple[int | None, ...]:
    if _on_cpu(weight):
        refused.append(Refusal("bucket", "all", "nothing is captured on a CPU"))
        return (None,)
    if kernel_reason(weight.device) is None:
        refused.append(
            Refusal("bucket", "all", "the kernel reads by length, so that one recording serves every length")
        )
        return (None,)
    return (BUCKET, BUCKET // 2, BUCKET * 2)


def _why_no_bits(subject: ModelTarget, device: str, context: int | None) -> str | None:
    """Why fewer bits would change nothing of a cache; None if they would."""
    if not subject.quantizes:
        return "this model's loop has no quantized caches"
    shape = shape_of(subject.decoder(subject.load(device)))
    if not any(layer.managed and layer.token is not None for layer in shape.layers):
        return "no layer of this model's cache is held in few bits: each is kept the model's own way"
    group = KVQuantization(8).group_size or 0
    if context is not None and context < 2 * group:
        return f"behind {context} tokens hardly any are held in few bits: they are in groups of {group}"
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
