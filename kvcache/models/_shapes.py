"""What a cache of a model is made of, asked of the cache that the model itself fills: without weights, on the meta device.

A config says it by as many names as there are models; the tensors that arrive in a cache say it alike for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from kvcache.cache import CacheShape, LayerShape, Token, layer_bytes, tensors_of
from kvcache.errors import GeometryError
from kvcache.models._compat import cache_kwarg
from kvcache.models._copies import structural_copy
from kvcache.models._facts import facts_of
from kvcache.models._meta import without_numbers
from kvcache.models._probe import embedding_table

T = TypeVar("T")
_FEW = 2  # tokens that a cache is looked at with
_MANY = 16  # and more than a window of them, to see whether a layer of a model's own kind still follows what those said
_REALLY = 1024  # tokens at most where they have numbers


_known: "WeakKeyDictionary[nn.Module, tuple[Any, CacheShape]]" = WeakKeyDictionary()


def cache_shape(model: Any, make: Callable[[Any], Any]) -> CacheShape:
    """The shape of a model's cache, asked once for as long as its dtype and the kinds of its layers stay.

    Args:
        model: a transformers model.
        make: makes an empty cache for it, whose layers keep everything.

    Raises:
        GeometryError: if the model cannot be run on one.
    """
    layers = _layers(make(model))
    said = model.dtype, tuple((type(one).__name__, getattr(one, "sliding_window", None)) for one in layers)
    known = _known.get(model)
    if known is None or known[0] != said:
        found = _asked(model, lambda runs, device: _measured(runs, make(model), device))
        if any(map(_unusual, layers)):
            found = _Unruly(model, make).where_it_differs(found)
        known = _known[model] = said, found
    return known[1]


def _asked(model: Any, ask: Callable[[Any, Any], T]) -> T:
    """What is found on the model without its weights, or else on the model itself.

    Args:
        ask: is given what to run, and the device of its input.
    """
    try:
        # A copy: some models keep what they saw for their next call.
        blank = model if model.device.type == "meta" else structural_copy(model, lambda name, module: None).to("meta")
        with without_numbers():
            return ask(blank, "meta")
    except Exception as error:
        if model.device.type == "meta":
            raise GeometryError(
                f"{type(model).__name__} cannot be run without its weights, to see what its cache holds: {error}; load it, "
                "and ask report() afterwards"
            ) from error
    try:
        # Weights that cannot be thought away, such as packed ones, or what an earlier request left behind for its later tokens:
        # a few tokens on the model itself, as a fresh request.
        with facts_of(model).as_fresh():
            return ask(model, model.device)
    except Exception as error:
        raise GeometryError(
            f"{type(model).__name__} cannot be run on tokens alone, to see what its cache holds ({type(error).__name__}: "
            f"{error}); run it, and ask report() afterwards"
        ) from error


def _measured(model: Any, cache: Any, device: Any) -> CacheShape:
    run_blank(model, cache, 1, _FEW, _FEW, device)
    before = [_beside(layer) for layer in _layers(cache)]
    run_blank(model, cache, 1, 1, _FEW, device)
    layers = []
    for layer, first in zip(_layers(cache), before, strict=True):
        kv = getattr(layer, "kv", None)
        if kv is not None:
            layers.append(LayerShape(True, _token_of(kv.keys, kv.values)))
            continue
        token = _token_of(getattr(layer, "keys", None), getattr(layer, "values", None))
        grown = _beside(layer) - first
        window = getattr(layer, "sliding_window", None) if token is not None else None
        layers.append(LayerShape(False, token, window, first - grown * _FEW, grown))
    cross = getattr(cache, "cross_attention_cache", None)
    held = 0 if cross is None else sum(t.numel() * t.element_size() for one in cross.layers for t in tensors_of(one))
    return CacheShape(tuple(layers), held // _FEW)


def run_blank(model: Any, cache: Any, rows: int, tokens: int, encoded: int, device: Any, **more: Any) -> Any:
    """What a model returns for tokens that have no meaning, on a cache.

    Args:
        rows, tokens: how many.
        encoded: positions of an encoder, where there is one, whose output is made up as well.
        device: where; on the meta device within `without_numbers`.
        **more: arguments of the model.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    given = {**cache_kwarg(model, cache), "use_cache": True, **more}
    if getattr(model.config, "is_encoder_decoder", False):
        if "encoder_outputs" not in given:
            own = getattr(model.get_encoder(), "config", None)  # FSMT's has none
            width = (model.config.get_text_config(encoder=True) if own is None else own).hidden_size
            states = torch.zeros(rows, encoded, width, dtype=model.dtype, device=device)
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
            given["encoder_outputs"]["pooler_output"] = states  # what an encoder of pictures hands on
        return model(decoder_input_ids=ids, **given)
    if (table := embedding_table(model)) is None:
        width = model.config.get_text_config(decoder=True).hidden_size
        return model(inputs_embeds=torch.zeros(rows, tokens, width, dtype=model.dtype, device=device), **given)
    # Some models look for pads among token ids, which have no numbers on the meta device.
    if torch.device(device).type == "meta":
        return model(inputs_embeds=table(ids), **given)
    return model(input_ids=ids, **given)


def reads_text(model: Any) -> bool:
    """Whether an encoder-decoder's encoder reads tokens; else it hears or sees."""
    return bool(model.main_input_name == "input_ids")


def encoder_input(model: Any, rows: int, tokens: int, device: Any) -> dict[str, Tensor]:
    """What an encoder-decoder is given for its encoder: so many tokens, or sound of the only length that it takes.

    Returns:
        ``input_ids`` ``[rows, tokens]``, or ``input_features`` ``[rows, mels, frames]``, all zeros.

    Raises:
        GeometryError: if its input is of another kind.
    """
    config = model.config
    if reads_text(model):
        return {"input_ids": torch.zeros(rows, tokens, dtype=torch.long, device=device)}
    mels, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if model.main_input_name != "input_features" or mels is None or positions is None:
        raise GeometryError(
            f"{type(model).__name__} reads {model.main_input_name}, of which kvcache knows no size; measure it with "
            "report() instead"
        )
    # Its convolutions halve the frames (Whisper, arXiv:2212.04356).
    return {"input_features": torch.zeros(rows, mels, 2 * positions, dtype=model.dtype, device=device)}


def _layers(cache: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(cache, "self_attention_cache", cache).layers
    return found


def _beside(layer: Any) -> int:
    """Bytes of what a layer of the model's own holds beside keys and values."""
    pair = [id(getattr(layer, name, None)) for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors_of(layer) if id(t) not in pair)


def _unusual(layer: Any) -> bool:
    """Whether it is of a class that came with one model: what it holds may follow a rule of its own."""
    return not type(layer).__module__.startswith(("transformers.cache_utils", "kvcache."))


class _Unruly:
    """Layers that have to be asked for each number of tokens.

    Args:
        model, make: see `cache_shape`. The model is not held.
    """

    def __init__(self, model: Any, make: Callable[[Any], Any]) -> None:
        self._model = ref(model)
        self._make = make
        self._known: dict[int, list[int]] = {}
        self._name = type(model).__name__

    def where_it_differs(self, shape: CacheShape) -> CacheShape:
        """The shape, whose layers are asked where many tokens show another rule than a few did."""
        layers = list(shape.layers)
        steps = _MANY + max((layer.window or 0 for layer in layers), default=0)
        whole, parts = self._held((2 * steps - 1, 1)), self._held((steps, *[1] * steps))
        for i, layer in enumerate(layers):
            if layer.managed or whole[i] == parts[i] == layer.own_bytes(2 * steps):
                continue
            layers[i] = replace(layer, asked=self._asking(i) if whole[i] == parts[i] else self._refusing(i))
        return replace(shape, layers=tuple(layers))

    def _asking(self, index: int) -> Callable[[int], int]:
        def asked(tokens: int) -> int:
            if tokens == 0:
                return 0
            if tokens not in self._known:
                # A step comes last: after a prompt a layer may hold more, until then.
                self._known[tokens] = self._held([n for n in (tokens - 1, 1) if n])
            return self._known[tokens][index]

        return asked

    def _refusing(self, index: int) -> Callable[[int], int]:
        def asked(_tokens: int) -> int:
            raise GeometryError(
                f"what layer {index} of {self._name} holds depends on how many of its tokens came at once, not only on how "
                "many came; run it, and ask report() afterwards"
            )

        return asked

    def _held(self, pieces: Sequence[int]) -> list[int]:
        """Bytes of a row of each layer after so many tokens, piece by piece."""
        model = self._model()
        assert model is not None  # who asks has it

        def run(runs: Any, device: Any) -> list[int]:
            if torch.device(device).type != "meta" and sum(pieces) > _REALLY:
                raise GeometryError(f"{sum(pieces)} tokens are too many to be run only for that")
            cache = self._make(model)
            for tokens in pieces:
                run_blank(runs, cache, 1, tokens, _FEW, device)
            return [layer_bytes(layer) for layer in _layers(cache)]

        return _asked(model, run)


def _token_of(keys: Any, values: Any) -> Token | None:
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4:
        return None
    return keys.shape[1], keys.shape[3], values.shape[3], keys.dtype
