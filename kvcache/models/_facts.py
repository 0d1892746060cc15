"""What is known of a model, and why a feature of a cache is not possible with it."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvcache.cache import WHY_NO_EVICTION, CacheGeometry, KeyRotation, Positions, positions_of
from kvcache.errors import GeometryError, PositionsError
from kvcache.models._beginnings import left_behind
from kvcache.models._evicting import banded, why_no_eviction
from kvcache.models._probe import TOKENS, Probe, closeness, parameters, untouched
from kvcache.models._probe import alike as alike
from kvcache.models._rotations import rope_by_length, turns_of
from kvcache.models._seats import Seat, masked_seats, named_seats, seats_in
from kvcache.models._signature import signature_of
from kvcache.models._spy import layers_of, spying_cache


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
            return ids, probe.run(ids, spying_cache(self.model)).output

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
                cache = spying_cache(model)
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
        return _Layout(shapes, *seats_in(notes), one_way, dtype)

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
            return named_seats(self.model) if self.model.device.type == "meta" else layout
        return layout.why_no_seats or masked_seats(self.model, layout.seats, self.as_fresh)

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
        model = self.model
        if (found := banded(model)) is not None:
            return f"{found} hides what is far back by a mask of its own, which counts slots"
        if isinstance(self._masks, str) or model.device.type == "meta":
            return WHY_NO_EVICTION.get(positions_of(model.config))  # nothing to compare with, or no numbers
        return why_no_eviction(model, self._masks, self.as_fresh)

    @cached_property
    def why_no_positions(self) -> str | None:
        """Why it cannot be told its positions from 0 on: untold, it counts them in another way."""
        if self.why_not_probed is not None or "position_ids" not in parameters(self.model):
            return None
        probe, told = self._probe, torch.arange(TOKENS, device=self.model.device)[None]
        with self.as_fresh():
            ids = probe.ids[None, :TOKENS]
            untold, taught = (
                probe.run(ids, spying_cache(self.model), more=more).output for more in ({}, {"position_ids": told})
            )
        same = alike(untold, taught, closeness(self.model, untold.dtype))
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
        return {0: self._layout} if isinstance(self._layout, str) else turns_of(self.model, self.as_fresh)

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
                return left_behind(self.model)
        except Exception as error:  # code of any model; the reason is told where it is asked for
            return f"a short prefix failed with {type(error).__name__}: {str(error)[:200]}"


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
