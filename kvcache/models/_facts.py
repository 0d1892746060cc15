"""What is known of a model, and why a feature of a cache is not possible with it."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from kvcache.cache import WHY_NO_EVICTION, CacheGeometry, KeyRotation, Positions, positions_of
from kvcache.errors import GeometryError, PositionsError
from kvcache.models._compat import cache_kwarg
from kvcache.models._probe import (
    TOKENS,
    Call,
    Notes,
    Probe,
    SpyLayer,
    cache_among,
    copied,
    layers_of,
    parameters,
    spying_cache,
    untouched,
)
from kvcache.models._signature import signature_of

_SHIFT = 7  # positions between the two runs that show how keys are turned
_HIDDEN = 2  # the token that a probe hides


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches of a token.

    Attributes:
        kv_heads: key and value heads.
        head_dim: size of a key.
        value_dim: size of a value.
    """

    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Seat:
    """A module that attends to the keys of one cache layer, and how it is given its mask.

    Attributes:
        layer: of the cache.
        module: its name in the model.
        mask: the name of the argument.
        hidden: the name of the argument that is ``[rows, tokens, width]``.
        additive: whether the mask that it takes is added to the scores, and not True for what is seen.
        cached: whether it is given the cache; one that shares another layer's keys need not be.
    """

    layer: int
    module: str
    mask: str
    hidden: str
    additive: bool
    cached: bool = True


@dataclass(frozen=True)
class _Layout:
    """What one run of two rows shows, which differ in their last token."""

    shapes: Mapping[int, LayerShape]
    seats: tuple[Seat, ...]
    why_no_seats: str | None
    one_way: bool
    dtype: torch.dtype | None  # of keys


class ModelFacts:
    """What a model does with a cache, found by running it. Each answer is found when it is first asked for, and kept.

    The answers that begin with ``why_no`` are None where a feature works, and else the reason in words.

    A run is a forward of at most six tokens in at most four rows. In all it takes for the shapes 1 of them, for prompts
    longer than a window 2 more, for eviction 3 more, for re-rotation 2 more, and for prefixes 1 and two calls of `generate`
    for one token. The user's own hooks fire in them; the model is afterwards what it was.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._name = type(model).__name__
        self._lock = threading.RLock()
        self._found: dict[str, str | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelFacts":
        return self

    def __repr__(self) -> str:
        return f"ModelFacts({self._name}, why_not_probed={self.why_not_probed!r})"

    @property
    def model(self) -> Any:
        """The model itself."""
        model = self._model()
        if model is None:
            raise ReferenceError(f"the {self._name} that these facts are of is gone")
        return model

    def once(self, feature: str, unsupported_reason: Callable[["ModelFacts"], str | None]) -> str | None:
        """Why another feature is not possible, by a trial that is made once."""
        if feature not in self._found:
            self._found[feature] = unsupported_reason(self)
        return self._found[feature]

    def trial(self) -> tuple[Tensor, Tensor]:
        """A prompt ``[1, 6]`` of token ids, and what the model says of it: logits, or its last states.

        Raises:
            GeometryError: if the model could not be run on token ids.
        """
        if isinstance(self._layout, str) or "input_ids" not in self._probe.given(self._probe.ids[None, :1]):
            raise GeometryError(f"{self._name} could not be tried: {self.why_not_probed or 'it takes embeddings only'}")
        with self.as_fresh():
            probe = self._probe
            ids = probe.ids[None, :TOKENS]
            return ids, probe.run(ids, spying_cache(self.model, _layers_told(self.model))).output

    def runs(self) -> bool:
        """Whether the model runs on these tokens alone, whatever else about it is not known."""
        try:
            with self.as_fresh():
                probe = self._probe
                self.model(**probe.given(probe.ids[None, :TOKENS]))
        except Exception:  # code of any model, which wants more than text
            return False
        return True

    # ------------------------------------------------------------------ shapes

    @property
    def why_not_probed(self) -> str | None:
        """Why the model could not be run; what follows is then told by its config, or refused."""
        return self._layout if isinstance(self._layout, str) else None

    @property
    def shapes(self) -> Mapping[int, LayerShape]:
        """What each layer caches, by its index; empty if the model could not be run."""
        return {} if isinstance(self._layout, str) else self._layout.shapes

    @property
    def one_way(self) -> bool:
        """Whether a token of a prompt is not changed by those that follow it."""
        return not isinstance(self._layout, str) and self._layout.one_way

    @cached_property
    def geometry(self) -> CacheGeometry:
        """The shape of the model's cache, as the model really caches.

        Raises:
            GeometryError: if neither a run nor the config says it.
        """
        model = self.model
        latent = any(hasattr(module, "expand_kv") for module in model.modules())
        shapes = self.shapes
        try:
            told = CacheGeometry.from_config(model.config, dtype=model.dtype, device=model.device, latent=latent)
        except GeometryError:
            own = len(layers_of(spying_cache(model, 0)))
            if self.why_not_probed is not None or not (own or shapes):
                raise
            # One without attention has no heads either: all of its layers are its own.
            told = CacheGeometry(own or max(shapes) + 1, 1, 1, 1, positions=positions_of(model.config))
        if not shapes or isinstance(self._layout, str):
            return told
        own = len(DynamicCache(config=model.config).layers)
        positions = self._positions(told.positions)
        table = told.max_positions
        if positions == "learned" and table is None:
            table = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        layers = min(told.layers, max(own, max(shapes) + 1))
        first = shapes[min(shapes)]
        each = tuple(astuple(shapes.get(i, LayerShape(0, 0, 0))) for i in range(layers))
        return replace(
            told,
            layers=layers,
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
            value_dim=first.value_dim,
            dtype=self._layout.dtype or model.dtype,
            device=model.device,
            shapes=() if len(set(each)) == 1 else each,
            positions=positions,
            max_positions=table,
        )

    def _positions(self, told: Positions) -> Positions:
        """How the model tells positions, where its config does not say."""
        if told != "unknown" or self._eviction is not None:
            return told
        turns = self._turns.values()
        if any(isinstance(turn, str) for turn in turns):
            return "learned"
        return "rope" if any(isinstance(turn, KeyRotation) for turn in turns) else "none"

    @cached_property
    def _layout(self) -> "_Layout | str":
        model = self.model
        if model.device.type == "meta":
            return "its weights are not in memory"
        try:
            with self._lock, untouched(model):
                probe = self._probe
                ids = probe.ids[None, :TOKENS].repeat(2, 1)
                ids[1, -1] = probe.ids[TOKENS]
                cache = spying_cache(model, _layers_told(model))
                notes = probe.run(ids, cache, follow=True)
            states = [*notes.keys.values(), *notes.values.values()]
            one_way = all(alike(each[0, :, :-1], each[1, :, :-1]) for each in states)
        except Exception as error:  # code of any model; the reason is told where it is asked for
            return f"a short run failed with {type(error).__name__}: {str(error)[:200]}"
        shapes = {i: LayerShape(k.shape[1], k.shape[3], notes.values[i].shape[3]) for i, k in notes.keys.items()}
        for i, layer in enumerate(layers_of(cache)):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4:
                shapes[i] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
        if any(keys.shape[2] != TOKENS for keys in notes.keys.values()):
            return f"{TOKENS} tokens were given and {max(k.shape[2] for k in notes.keys.values())} cached"
        dtype = next((keys.dtype for keys in notes.keys.values()), None)
        return _Layout(shapes, *_seats(notes), one_way, dtype)

    @property
    def _probe(self) -> Probe:
        """Made anew each time, and always the same: nothing of it is held between the runs."""
        return Probe(self.model)

    # ------------------------------------------------------------------ masks

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The modules that attend to what our layers hold, and whose mask can be replaced; empty where it cannot."""
        return () if isinstance(self._masks, str) else self._masks

    @property
    def why_no_long_prompt(self) -> str | None:
        """Why several tokens at once cannot each see a window of their own."""
        return self._masks if isinstance(self._masks, str) else None

    @cached_property
    def _masks(self) -> "tuple[Seat, ...] | str":
        layout = self._layout
        if isinstance(layout, str):
            return self._named() if self.model.device.type == "meta" else layout
        if layout.why_no_seats is not None:
            return layout.why_no_seats
        reasons = []
        for additive in (self._additive(), not self._additive()):
            seats = tuple(replace(seat, additive=additive) for seat in layout.seats)
            if (reason := self._why_not_masked(seats)) is None:
                return seats
            reasons.append(reason)
        return reasons[0]

    def _named(self) -> tuple[Seat, ...]:
        """What is taken for attention by its name, in a model without weights, which computes nothing."""
        return tuple(
            Seat(module.layer_idx, name, "attention_mask", "hidden_states", self._additive())
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "layer_idx", None), int)
            and {"attention_mask", "hidden_states"} <= set(parameters(module))
            and not any(isinstance(getattr(part, "layer_idx", None), int) for part in module.children())
        )

    def _additive(self) -> bool:
        return getattr(self.model.config, "_attn_implementation", "eager") == "eager"

    def _why_not_masked(self, seats: Sequence[Seat]) -> str | None:
        """Hide a token by other masks, and change it in every second row: what hides it must not change, the rest must."""
        layout, probe = self._layout, self._probe
        assert not isinstance(layout, str)
        visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(4, 1, -1, -1).clone()
        visible[2:, :, _HIDDEN:, _HIDDEN] = False  # from itself as well, so that other layers do not hand it on

        def edit(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = keys.clone(), values.clone()
            for states in (keys, values):
                states[1::2, :, _HIDDEN] = probe.noise(states[:1, :, _HIDDEN])
            return keys, values

        names = [seat.module for seat in seats]
        try:
            with self.as_fresh():
                ids = probe.ids[None, :TOKENS].expand(4, -1)
                cache = spying_cache(self.model, _layers_told(self.model))
                out = probe.run(ids, cache, edit=edit, masks=self._as_masks(seats, visible), wanted=names).outputs
                plain = probe.run(ids[:1], spying_cache(self.model, _layers_told(self.model)), wanted=names).outputs
        except Exception as error:  # code of any model; the reason is told where it is asked for
            return f"its attention takes no other mask ({type(error).__name__})"
        for number, name in enumerate(names):
            one = out[name].transpose(0, 1) if out[name].shape[0] != 4 else out[name]
            after = one[:, _HIDDEN + 1 :]
            if not alike(after[2], after[3]):
                return f"{name} attends to more than its mask allows"
            if alike(after[0], after[1]) or alike(after[0], after[2]):
                return f"{name} computes with other keys than its cache returned"
            # Behind the first layer, half precision differs by rounding, and a mixture of experts by more.
            if (number == 0 or one.dtype == torch.float32) and not alike(one[:1], plain[name]):
                return f"{name} puts more into its mask than which token sees which"
        return None

    def _as_masks(self, seats: Sequence[Seat], visible: Tensor) -> dict[str, tuple[str, Tensor]]:
        model = self.model
        visible = visible.to(model.device)
        added = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
        added = added.masked_fill(~visible, torch.finfo(model.dtype).min)
        return {seat.module: (seat.mask, added if seat.additive else visible) for seat in seats}

    # ------------------------------------------------------------------ eviction

    @cached_property
    def why_no_eviction(self) -> str | None:
        """Why tokens cannot leave a cache of this model before others."""
        told = self.geometry.positions
        if (why := WHY_NO_EVICTION.get(told)) is not None and told != "unknown":
            return why
        return self._eviction

    @cached_property
    def _eviction(self) -> str | None:
        """Two tokens hidden by a mask, and the same two gone: a token that follows must not tell the difference."""
        if (banded := _banded(self.model)) is not None:
            return f"{banded} hides what is far back by a mask of its own, which counts slots"
        masks, told = self._masks, positions_of(self.model.config)
        if isinstance(masks, str) or self.model.device.type == "meta":
            return WHY_NO_EVICTION.get(told)  # nothing to compare with, or no numbers
        probe, names, gone = self._probe, [seat.module for seat in masks], (1, 2)
        visible = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
        visible[..., list(gone)] = False
        try:
            with self.as_fresh():
                ids = probe.ids[None, :TOKENS]
                cache = spying_cache(self.model, _layers_told(self.model))
                probe.run(ids[:, :-1], cache)
                other = copied(cache)
                for layer in _spies(other):
                    layer.keep([i for i in range(TOKENS - 1) if i not in gone])
                masked = probe.run(ids[:, -1:], cache, masks=self._as_masks(masks, visible), wanted=names).outputs
                evicted = probe.run(ids[:, -1:], other, wanted=names).outputs
        except Exception as error:  # code of any model; the reason is told where it is asked for
            return f"a short run without two of its tokens failed with {type(error).__name__}: {str(error)[:200]}"
        for name in names:
            if not alike(masked[name], evicted[name]):
                return "without a token that was hidden, it computes something else: its positions count slots"
            if masked[name].dtype != torch.float32:
                break  # deeper layers differ by rounding, and a mixture of experts by more
        return None

    @cached_property
    def why_no_positions(self) -> str | None:
        """Why it cannot be told its positions from 0 on: untold, it counts them in another way."""
        if self.why_not_probed is not None or "position_ids" not in parameters(self.model):
            return None
        probe, told = self._probe, torch.arange(TOKENS, device=self.model.device)[None]
        with self.as_fresh():
            ids = probe.ids[None, :TOKENS]
            untold, taught = (
                probe.run(ids, spying_cache(self.model, _layers_told(self.model)), more=more).output
                for more in ({}, {"position_ids": told})
            )
        same = alike(untold, taught, None if untold.dtype == torch.float32 else 0.3)
        return None if same else "it counts its positions in a way of its own"

    # ------------------------------------------------------------------ how keys are turned

    @cached_property
    def why_no_rerotation(self) -> str | None:
        """Why keys cannot be turned to other positions."""
        if (kind := rope_by_length(self.model)) is not None:
            return f"{kind!r} RoPE changes its frequencies with the length"
        return next((turn for turn in self._turns.values() if isinstance(turn, str)), None)

    def rotation(self, layer: int) -> KeyRotation | None:
        """How the keys of one layer are turned; None where they carry no position.

        Raises:
            PositionsError: if they cannot be turned.
        """
        if (why := self.why_no_rerotation) is not None:
            raise PositionsError(f"keys cannot be re-rotated: {why}; keep positions='absolute'")
        turn = self._turns.get(layer)
        assert not isinstance(turn, str)
        return turn

    @cached_property
    def _turns(self) -> Mapping[int, KeyRotation | str | None]:
        """A short text at two positions: how the keys of its first token differ is how each layer turns them."""
        if isinstance(self._layout, str):
            return {0: self._layout}
        probe, layers = self._probe, _layers_told(self.model)
        try:
            with self.as_fresh():
                ids = probe.ids[None, : TOKENS // 2]
                notes = [probe.run(ids, spying_cache(self.model, layers, seen, sliding=True)) for seen in (0, _SHIFT)]
        except Exception as error:  # code of any model; the reason is told where it is asked for
            return {0: f"a short run failed with {type(error).__name__}: {str(error)[:200]}"}
        known = list(rotations(self.model))
        found: dict[int, KeyRotation | str | None] = {}
        for i, keys in notes[0].keys.items():
            later = notes[1].keys[i]
            found[i] = _turn(
                i, keys[:, :, :1], later[:, :, :1], known
            )  # of the first, which has seen nothing but itself
            if not alike(notes[0].values[i][:, :, :1], notes[1].values[i][:, :, :1]):
                found[i] = f"what layer {i} stores beside its keys carries positions, too"
        same = alike(notes[0].output, notes[1].output, None if notes[0].output.dtype == torch.float32 else 0.3)
        if not same and not any(isinstance(turn, str) for turn in found.values()):
            return {0: "its attention is another at other positions, though distances are the same"}
        return found

    # ------------------------------------------------------------------ prefixes

    @property
    def request_state(self) -> tuple[tuple[str, str], ...]:
        """Attributes of modules that a prompt leaves behind for its later tokens: module and attribute."""
        return () if isinstance(self._prefixes, str) else self._prefixes

    @property
    def why_no_prefix(self) -> str | None:
        """Why what was computed of a beginning cannot be continued by another request."""
        if self.why_not_probed is None and not self.one_way:
            return "its tokens also depend on those that follow"
        return self._prefixes if isinstance(self._prefixes, str) else None

    @contextmanager
    def as_fresh(self, model: Any = None) -> Iterator[None]:
        """Run the model, or a copy of it, in here as a fresh request would, whatever an earlier one left on it.

        Afterwards it is what it was, see `untouched`.
        """
        model = self.model if model is None else model
        with self._lock, untouched(model):
            self.clear_request_state(model)
            yield

    def clear_request_state(self, model: Any = None) -> None:
        """Forget what an earlier request has left on the model, or on a copy of it, as a fresh prompt would."""
        model = self.model if model is None else model
        held = (value for module in model.modules() for value in vars(module).values())
        if "_prefixes" not in vars(self) and not any(isinstance(value, Tensor) for value in held):
            return  # nothing is there that could have been left
        for name, attribute in self.request_state:
            setattr(model.get_submodule(name), attribute, None)

    @cached_property
    def _prefixes(self) -> "tuple[tuple[str, str], ...] | str":
        if isinstance(self._layout, str):
            return self._layout
        try:
            with self._lock, untouched(self.model):
                return self._prefix_run()
        except Exception as error:  # code of any model; the reason is told where it is asked for
            return f"a short prefix failed with {type(error).__name__}: {str(error)[:200]}"

    def _prefix_run(self) -> "tuple[tuple[str, str], ...] | str":
        """A prompt in one go, and the same behind a beginning that is known, after another request."""
        probe, model, layers = self._probe, self.model, _layers_told(self.model)
        ids = probe.ids[None, :TOKENS]
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        whole, keys = self._generated(ids, spying_cache(model, layers, sliding=True))
        left = tuple(
            (name, attribute)
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, Tensor) and value is not before[name].get(attribute)
        )
        for name, attribute in left:
            module = model.get_submodule(name)
            setattr(module, attribute, getattr(module, attribute) + _SHIFT)
        cache = spying_cache(model, layers, sliding=True)
        for name, attribute in left:
            setattr(model.get_submodule(name), attribute, None)
        half = TOKENS // 2
        run_prefix(model, probe.given(ids[:, :half]), cache, 0)
        for i, states in keys.items():
            mine = layers_of(cache)[i].keys
            if mine is None or mine.shape[2] != half or not alike(mine, states[:, :, :half]):
                return "what it computes of a beginning is not what it computes of a whole prompt"
            if states.dtype != torch.float32:
                break  # deeper layers differ by rounding, and a mixture of experts by more
        for name, attribute in left:
            setattr(model.get_submodule(name), attribute, None)
        behind, _ = self._generated(ids, cache)
        if not alike(behind, whole, 1e-3 if whole.dtype == torch.float32 else 0.3):
            return "behind a beginning that is known, its positions are others than in a whole prompt"
        return left

    def _generated(self, ids: Tensor, cache: Any) -> tuple[Tensor, dict[int, Tensor]]:
        """The logits of the next token, or of a model without a head its last states, and all keys."""
        model, probe = self.model, self._probe
        if not hasattr(model, "generation_config"):
            seen = int(cache.get_seq_length())  # a body alone is given what follows, where `generate` is given all
            out = model(
                **_behind(probe.given(ids[:, seen:]), seen, model), **cache_kwarg(model, cache), use_cache=True
            )[0]
            return out[:, -1], {i: layer.keys for i, layer in enumerate(layers_of(cache))}
        given = probe.given(ids)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=1, do_sample=False, use_cache=True, return_dict_in_generate=True
        )
        settings.output_logits, settings.pad_token_id = True, 0
        mask = torch.ones(ids.shape, dtype=torch.long, device=ids.device)  # as a request with a prefix has one
        out = model.generate(**given, attention_mask=mask, **cache_kwarg(model, cache), generation_config=settings)
        return out.logits[0], {i: layer.keys for i, layer in enumerate(layers_of(cache)) if layer.keys is not None}


# ---------------------------------------------------------------------- asking


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, ModelFacts]] = weakref.WeakKeyDictionary()


def facts_of(model: Any) -> ModelFacts:
    """What is known of a model, as it is now: after a change of it, facts are found anew.

    Args:
        model: a transformers model, with or without a head.
    """
    signature = signature_of(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != signature:
        known = _KNOWN[model] = signature, ModelFacts(model)
    return known[1]


def geometry_of(model: Any) -> CacheGeometry:
    """The geometry of a loaded transformers model, in the dtype and on the device of its weights.

    A model whose weights are in memory is run once on a few tokens, and what it caches is what counts; of one on the meta device
    its config is asked.

    Raises:
        GeometryError: if neither says how many layers and heads there are.
    """
    return facts_of(model).geometry


def _banded(model: nn.Module) -> str | None:
    """A module with a table of which slot sees which, in which the last does not see the first (GPT-Neo); None without one."""
    for name, module in model.named_modules():
        for table in module._buffers.values():
            square = isinstance(table, Tensor) and table.dtype == torch.bool and table.dim() >= 2
            if square and 1 < table.shape[-1] == table.shape[-2] and table.device.type != "meta":
                last = table[..., -1, :]
                if bool(last[..., -1].all()) and not bool(last[..., 0].any()):
                    return str(name)
    return None


def _seats(notes: Notes) -> tuple[tuple[Seat, ...], str | None]:
    """Which module attends to which layer's keys, or why that cannot be said."""
    found: dict[str, Seat] = {}
    for layer in notes.keys:
        reads = [read for read in notes.reads if read.layer == layer]
        if not reads:
            return (), f"nothing attends to the keys that the cache of layer {layer} returned"
        for read in reads:
            seat = next(filter(None, (_seat(layer, call) for call in reversed(read.calls))), None)
            if seat is None:
                return (), f"no module that attends for layer {layer} is given a mask"
            if found.setdefault(seat.module, seat).layer != layer:
                return (), f"{seat.module or 'the model'} attends for more than one layer"
    return tuple(found.values()), None


def _seat(layer: int, call: Call) -> Seat | None:
    hidden = next(
        (n for n, v in call.given.items() if isinstance(v, Tensor) and v.dim() == 3 and v.shape[1] == TOKENS), ""
    )
    named = {**dict.fromkeys(parameters(call.module)), **call.given}
    masks = [n for n, v in named.items() if "mask" in n and "head" not in n and (v is None or _is_mask(v))]
    masks.sort(key=lambda n: (named[n] is None, n != "attention_mask"))
    return (
        Seat(layer, call.name, masks[0], hidden, False, cache_among(call.given) is not None)
        if masks and hidden and call.name
        else None
    )


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _spies(cache: Any) -> list[SpyLayer]:
    return [layer for layer in layers_of(cache) if isinstance(layer, SpyLayer)]


def _layers_told(model: Any) -> int:
    try:
        return CacheGeometry.from_config(model.config).layers
    except GeometryError:
        return 0


def alike(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Whether two results are the same but for rounding."""
    if tolerance is None:
        tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 4e-2
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30))


# ---------------------------------------------------------------------- positions


_BY_LENGTH = ("dynamic", "longrope")  # RoPE whose frequencies depend on how long the text becomes


def rope_by_length(model: Any) -> str | None:
    """The kind of a model's rotary embedding, if its frequencies depend on how long the text becomes."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return next((kind for kind in kinds if kind in _BY_LENGTH), None)


def rotations(model: Any) -> Iterator[KeyRotation]:
    """The ways in which the frequencies that a model holds could turn its keys."""
    held: list[Tensor] = []
    for module in model.modules():
        tensors = {**vars(module), **module._buffers}
        held += [t for name, t in tensors.items() if "inv_freq" in name and isinstance(t, Tensor) and t.dim() == 1]
        held += [frequencies for t in tensors.values() if (frequencies := _of_table(t)) is not None]
    distinct: list[Tensor] = []
    for frequencies in held:
        if not any(frequencies.shape == one.shape and torch.equal(frequencies, one) for one in distinct):
            distinct.append(frequencies)
    for frequencies in distinct:
        for interleaved in (False, True):
            yield KeyRotation(frequencies, interleaved)


def _of_table(table: Any) -> Tensor | None:
    """The frequencies of a table whose rows are the sines, then the cosines, of a position times them (GPT-J)."""
    if not isinstance(table, Tensor) or table.dtype != torch.float32 or table.dim() != 2:
        return None
    if table.shape[0] < 2 or table.shape[1] % 2 or table.device.type == "meta":
        return None
    (sines, cosines), (none, ones) = table[1].chunk(2), table[0].chunk(2)
    return torch.atan2(sines, cosines) if bool((none == 0).all() and (ones == 1).all()) else None


def _turn(layer: int, keys: Tensor, later: Tensor, known: list[KeyRotation]) -> KeyRotation | str | None:
    """What makes a token's keys ``[1, KV heads, 1, dim]`` those that it has `_SHIFT` positions later."""
    if alike(keys, later):
        return None
    spare = {one: keys.shape[3] - 2 * one.inv_freq.numel() for one in known}
    for one in known:
        if spare[one] >= one.first and alike(one(keys, _SHIFT), later):
            return one
    for one in known:
        behind = KeyRotation(one.inv_freq, one.interleaved, spare[one])
        if spare[one] > 0 and one.first == 0 and alike(behind(keys, _SHIFT), later):
            known.append(behind)
            return behind
    return f"the keys of layer {layer} change with their position in another way than by a rotation"


# ---------------------------------------------------------------------- prefixes


def run_prefix(model: Any, given: Mapping[str, Tensor], cache: Any, start: int) -> None:
    """Run a part of a prefix on a cache, at the positions that `generate` would give it.

    Args:
        given: ``input_ids`` or ``inputs_embeds`` of one row.
        start: tokens before it.
    """
    body = getattr(model, "base_model", model)  # without the head: nobody asks for a prefix's logits
    body(**_behind(given, start, body), **cache_kwarg(body, cache), use_cache=True)


def _behind(given: Mapping[str, Tensor], start: int, body: Any) -> dict[str, Tensor]:
    states = next(iter(given.values()))
    if "position_ids" not in parameters(body):
        return dict(given)
    return {**given, "position_ids": torch.arange(start, start + states.shape[1], device=states.device)[None]}
