"""A model's linear layers in fewer bits: bf16, fp16 or int8, on the kernels that are fastest where it runs.

Decoding a token reads every weight once and does little with it, so half the bits are half the time. What is converted
is a copy: it shares all that stays as it is, and the model itself is not touched. It is a copy of the moment: weights that
are packed are as they were then, whatever becomes of the model's; make another after a change.

On a CPU only the linear layers change, each with its weights packed for its kernel; norms, rotary positions, the residual
stream and the head stay in fp32. int8 keeps one scale per output channel for the weights (symmetric, rounded to nearest)
and one range per token for the activations, from its least number to its greatest, found as it comes (as ZeroQuant has it,
Yao et al., arXiv:2206.01861). On a GPU bf16 and fp16 convert the whole module, as is usual there: casts around each layer
would cost more than they save.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvcache.errors import InputError
from kvcache.memory import malloc_trim
from kvcache.models._copies import structural_copy
from kvcache.models._forwards import forward_of, hooks_of, patched, reached, unwrapped
from kvcache.models._packed import DTYPES, PackedLinear, Part, has_half
from kvcache.models._signature import signature_of
from kvcache.models._walk import ASIDE

Precision = Literal["fp32", "bf16", "fp16", "int8"]


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what cannot be computed on `device`.

    Raises:
        InputError: with what can.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision={precision!r} must be one of {', '.join(map(repr, get_args(Precision)))}")
    if _like_cpu(device) and precision in ("bf16", "fp16") and not has_half(precision):
        raise InputError(
            f"precision={precision!r}: this CPU has no fast {precision} arithmetic (AVX-512 or AMX); use 'int8' or 'fp32'"
        )
    if (
        _like_cpu(device)
        and precision == "int8"
        and not (torch._C._has_mkldnn and hasattr(torch.ops.onednn, "qlinear_prepack"))
    ):
        raise InputError("precision='int8': this build of torch has no int8 kernels for CPUs; use 'bf16' or 'fp32'")
    if not _like_cpu(device) and precision == "int8":
        raise InputError(
            f"precision='int8' runs on CPUs; on {device.type} use 'bf16', or quantize the model with torchao before it is wrapped"
        )


def _like_cpu(device: torch.device) -> bool:
    """A model on the meta device is one that is planned for a CPU: it gets the same layers, of shapes without numbers."""
    return device.type in ("cpu", "meta")


def quantize_linear(model: nn.Module, precision: Precision, *, modules_to_not_convert: Collection[str] = ()) -> Any:
    """A copy of `model` whose linear layers compute in `precision`; what does not change is shared with it.

    Args:
        model: in fp32 where it shall run on a CPU; a bare decoder, or a model with its head, which is left as it is.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``. On a CPU only plain linear layers change: those that do
            more (LoRA's, quantized ones, with hooks or a forward of their own) stay as they are, with all that is in them.
        modules_to_not_convert: linear layers that stay as they are, by the end of their names, such as ``"mlp.down_proj"`` or
            ``"layers.0.mlp.down_proj"``.

    Raises:
        InputError: if this device cannot, the model is not fp32, a name in `wide` is no linear layer, no plain linear layer
            is left, or the model cannot be copied.
    """
    model = unwrapped(model)
    weight = next(model.parameters())
    check_precision(precision, weight.device)
    linear = {name: module for name, module in _named(model) if isinstance(module, nn.Linear | Conv1D)}
    for end in modules_to_not_convert:
        if not any(_ends(name, end) for name in linear):
            raise InputError(
                f"wide names {end!r}, and no linear layer's name ends so; there are, for example, {list(linear)[:3]}"
            )
    if weight.dtype == DTYPES.get(precision) and (precision == "fp32" or not _like_cpu(weight.device)):
        return model
    if (why := signature_of(model).why_no_copy) is not None:
        raise InputError(f"{type(model).__name__} cannot be copied to compute in {precision}: {why}")
    if not _like_cpu(weight.device):
        return cast(model, DTYPES[precision])
    if weight.dtype != torch.float32:
        raise InputError(
            f"the model is {weight.dtype}: on a CPU precision={precision!r} starts from fp32; load it with dtype=torch.float32"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plain = {name: module for name, module in _plain_linear(model).items() if module is not head}
    if not plain and any(module is not head for module in linear.values()):
        raise InputError(
            f"precision={precision!r}: none of the {len(linear)} linear layers of {type(model).__name__} is a plain one, "
            "which could be converted; merge adapters and remove hooks first"
        )
    packed: dict[str, nn.Module] = {}
    for name, module in plain.items():
        if name not in packed and not any(_ends(name, end) for end in modules_to_not_convert):
            packed |= _packed(name, module, plain, precision, modules_to_not_convert)
    if weight.device.type == "cpu":
        malloc_trim()  # what packing took for a moment: of SmolLM2 in int8, 329 MiB
    return structural_copy(model, lambda name, module: packed.get(name))


@torch.no_grad()
def find_sensitive_layers(
    model: Any,
    precision: Precision,
    batches: Sequence[Any],
    *,
    bound: float = 0.01,
    forward: Callable[[Any, Any], Tensor] = lambda model, batch: model(batch).logits,
) -> list[str]:
    """The linear layers to keep wide, for `quantize_linear`, so that the model says nearly what it says in fp32.

    Each layer (queries, keys and values together, as gate and up) is converted alone. How far the prediction of the next
    token moves by it is the divergence KL(fp32 || converted), in nats per token. Divergences of layers about add up: those
    that move it most stay wide, until the others' come to no more than `bound`. This runs the model as often as it has such
    layers; some hundreds of tokens are enough.

    Args:
        model: in fp32, on a CPU.
        precision: what it is to become.
        batches: samples of what it will read: token ids ``[rows, tokens]``, or what else `forward` takes.
        bound: of the divergence. 0.01 nats change a perplexity by about a percent at most; 0 keeps every layer wide.
        forward: from a model and a batch to logits ``[..., vocabulary]``.

    Returns:
        Full names, the most sensitive first.

    Raises:
        InputError: if there is no batch, this device cannot, or the model is not fp32.
    """
    weight = next(model.parameters())
    if not batches or weight.device.type != "cpu":
        raise InputError(
            f"{len(batches)} batches and a model on {weight.device}: give at least one, and a model on a CPU; elsewhere all "
            "layers are converted"
        )
    expected = [forward(model, batch).float().log_softmax(-1) for batch in batches]
    tokens = sum(logits.shape[:-1].numel() for logits in expected)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name, part in _plain_linear(model).items() if part is not head]
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        first = next((group[0] for group in _TOGETHER if own in group), own)
        groups.setdefault(f"{parent}.{first}", []).append(name)
    moved: dict[str, float] = {}
    for group, inside in groups.items():
        converted = quantize_linear(
            model, precision, modules_to_not_convert=[name for name in names if name not in inside]
        )
        moved[group] = (
            sum(
                float((ours.exp() * (ours - forward(converted, batch).float().log_softmax(-1))).sum())
                for batch, ours in zip(batches, expected, strict=True)
            )
            / tokens
        )
    modules_to_not_convert: list[str] = []
    left = sum(moved.values())
    for group in sorted(moved, key=lambda name: moved[name], reverse=True):
        if left <= bound and bound > 0:
            break
        left -= moved[group]
        modules_to_not_convert += groups[group]
    return modules_to_not_convert


_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by name, as if none were wrapped by `torch.compile`."""
    for name, module in model.named_modules():
        if unwrapped(module) is module:
            yield name.replace("_orig_mod.", ""), module


def _plain_linear(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The layers that can be converted, by name: plain ones, which whoever holds them calls.

    Who reads their weights (the layers of adapters, some gated MLPs) keeps them.
    """
    modules = dict(_named(model))
    found = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    return {
        name: module
        for name, module in found.items()
        if is_plain(module) and "weight" not in _names_used(_holder(name, modules))
    }


def _holder(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module whose code calls this one: a list of modules calls none."""
    parent = modules[name.rpartition(".")[0]]
    while isinstance(parent, nn.ModuleDict | nn.ModuleList) and name:
        name = name.rpartition(".")[0]
        parent = modules[name.rpartition(".")[0]]
    return parent


def _names_used(module: nn.Module) -> frozenset[str]:
    return _names_in(type(module))  # type: ignore[arg-type]  # a class, which mypy takes for what it makes


@lru_cache(maxsize=1024)
def _names_in(kind: type) -> frozenset[str]:
    return frozenset(name for function in reached(kind) for name in function.__code__.co_names)


def is_plain(module: nn.Linear | Conv1D) -> bool:
    """Whether a layer is its weights and nothing else: ``nn.Linear``, GPT-2's ``Conv1D``, or one that says the same."""
    base = Conv1D if isinstance(module, Conv1D) else nn.Linear
    held, plain = vars(module), vars(_smallest(base))
    if hooks_of(module) or forward_of(module) is not None or patched(type(module)):
        return False
    if held.keys() - plain.keys() - ASIDE or held["_parameters"].keys() - plain["_parameters"].keys():
        return False
    if module._buffers or module._modules or type(module.weight) not in (Tensor, nn.Parameter):
        return False
    return type(module) is base or _says_the_same(module, base)


@cache
def _smallest(base: type[nn.Linear | Conv1D]) -> nn.Linear | Conv1D:
    with torch.random.fork_rng(devices=[]):  # its weights are drawn, and nobody asked for that
        return base(1, 1)


def _says_the_same(module: nn.Linear | Conv1D, base: type[nn.Linear | Conv1D]) -> bool:
    """Whether a layer of a derived class gives what one of `base` would, tried with weights of a few numbers."""
    weight, states = torch.linspace(-1, 1, 15).view(3, 5).sin(), torch.linspace(-2, 3, 10).view(2, 5)
    bias = None if module.bias is None else torch.linspace(1, 2, 3)
    twin = nn.Module.__new__(type(module))
    sizes = {"nx": 5, "nf": 3} if base is Conv1D else {"in_features": 5, "out_features": 3}
    twin.__dict__.update(vars(module), **sizes)
    twin.__dict__["_parameters"] = {"weight": weight.t() if base is Conv1D else weight, "bias": bias}
    try:
        with torch.no_grad():
            return torch.allclose(twin(states), nn.functional.linear(states, weight, bias), atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants other inputs
        return False


def _packed(
    name: str,
    module: nn.Linear | Conv1D,
    plain: Mapping[str, nn.Linear | Conv1D],
    precision: str,
    modules_to_not_convert: Collection[str],
) -> dict[str, nn.Module]:
    """What takes the place of a linear layer, and of those that read the same input, by name."""
    parent, _, own = name.rpartition(".")
    for group in _TOGETHER:
        if own == group[0]:
            names = [f"{parent}.{other}" if parent else other for other in group]
            layers = [layer for n in names if isinstance(layer := plain.get(n), nn.Linear)]
            if len(layers) == len(group) and not any(_ends(n, end) for n in names for end in modules_to_not_convert):
                together = PackedLinear(layers, precision)
                parts = [Part(together, i) for i in range(len(group))]
                return {n: part.of(parts[0]) for n, part in zip(names, parts, strict=True)}
    return {name: PackedLinear([module], precision)}


def planned(model: nn.Module, precision: Precision | None, device: torch.device) -> Any:
    """A model on the meta device as `quantize_linear` would make it on another, which need not be there.

    Raises:
        InputError: if that device cannot.
    """
    if precision is None:
        return model
    check_precision(precision, device)
    if device.type == "cpu":
        return quantize_linear(model, precision)
    return model if next(model.parameters()).dtype == DTYPES[precision] else cast(model, DTYPES[precision])


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in another dtype, but for its rotary frequencies."""
    new: nn.Module = structural_copy(model, lambda name, module: None)
    with torch.no_grad():
        for module in new.modules():
            kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in kinds:
                for name, tensor in held.items():
                    # Rotary frequencies stay in fp32: in bf16 the positions of a long text would melt into each other.
                    if tensor is not None and tensor.is_floating_point() and "inv_freq" not in name:
                        cast = tensor.to(dtype)
                        held[name] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
    return new


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
