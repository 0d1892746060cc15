"""The caches of one model under one policy: made, estimated, and what the model runs as on them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from kvcache.cache import CacheGeometry, CacheSpec, LayerCache, Pinned, SizePolicy
from kvcache.errors import GeometryError, InputError, PolicyError
from kvcache.generation import Wanted, check_no_pads
from kvcache.models import (
    Following,
    MadeFor,
    Signature,
    check_ranking,
    exact_windows,
    geometry_of,
    kv_layers,
    left_padding,
    new_cache,
    observed_copy,
    shape_of,
    structural_copy,
    takes,
)
from kvcache.prefixes import PrefixSnapshot


@dataclass(frozen=True)
class _FromModel:
    """What is made of a model, and made anew when the model has changed."""

    geometry: CacheGeometry
    observed_model: Any


class ModelCaches:
    """Makes caches of one model under one policy.

    Args:
        model: a transformers model.
        spec: what is asked of them.

    Attributes:
        evicts: whether tokens leave.
        ranks: whether that is decided by what is looked at.

    Raises:
        PolicyError, PositionsError: if that cannot work for this model.
    """

    def __init__(self, model: Any, spec: CacheSpec) -> None:
        self.model, self.spec = model, spec
        # Says now, not at the first request, what cannot work.
        first = new_cache(model, spec)
        self.evicts = spec.evicts
        self.ranks = any(kv.by_head for kv in kv_layers(first, some=False))
        self._of_model = Following(model, self._make)
        self._of_model.now()

    def _make(self) -> _FromModel:
        geometry = geometry_of(self.model)
        if self.ranks:
            observed_model = observed_copy(self.model)
            check_ranking(self.model, observed_model)
            return _FromModel(geometry, observed_model)
        signature = self._of_model.watch.signature()
        if signature.compiled and signature.why_no_copy is None and self.evicts:
            # Masks are put in by hooks, which compiled modules may not run.
            return _FromModel(geometry, structural_copy(self.model, lambda name, module: None))
        return _FromModel(geometry, self.model)

    def one_model(self, runs: bool) -> AbstractContextManager[Signature]:
        """A block for which the model is one: whether it has changed is asked once, at the begin.

        Args:
            runs: whether the block runs the model; what it changes of itself meanwhile is learned.
        """
        return self._of_model.watch.running(runs)

    def changed_since(self, made_for: MadeFor) -> bool:
        """Whether the model is another than it was when a cache was made; not if that is unknown."""
        return made_for.then is not None and self._of_model.watch.changed_since(made_for.then)

    @property
    def observed_model(self) -> Any:
        """What runs on these caches: the model, or a copy that shares its weights, see `KVCacheManager.observed_model`."""
        return self._of_model.now().observed_model

    @property
    def geometry(self) -> CacheGeometry:
        """The sizes of the model's cache."""
        return self._of_model.now().geometry

    @property
    def model_makes_its_own(self) -> bool:
        """Whether the model generates without a cache, or on one of its own making."""
        mine: Any = self.model if isinstance(self.model, GenerationMixin) else None
        return mine is not None and not (mine._supports_default_dynamic_cache() and takes(mine))

    @property
    def matter(self) -> bool:
        """Whether a run would go, or end, another way on the model's own cache."""
        return self.evicts or self.spec.max_length is not None or not self.spec.storage.plain

    def exactly(self) -> AbstractContextManager[None]:
        """A block in which each token of a prompt sees what the policy says, see `kvcache.models.exact_windows`."""
        return exact_windows(self.observed_model) if self.evicts else nullcontext()

    # ------------------------------------------------------------------ new ones

    def empty(self, rows: int | None, attention_mask: Tensor | None = None, *, crossing: bool | None = None) -> Any:
        """A cache for so many rows, padded as the mask says.

        Args:
            rows: None for as many as come.
            attention_mask: ``[rows, tokens]``.
            crossing: see `kvcache.models.new_cache`.
        """
        return self._made(self.spec, rows, attention_mask, crossing)

    def like(self, layers: Sequence[LayerCache]) -> Any:
        """An empty cache for as many rows, whose layers have the policies of these: of one that begins with a prefix, too.

        Raises:
            InputError: if they hold their tokens in another way than those of these caches.
        """
        ways = {layer.storage for layer in layers} - {self.spec.storage, self.spec.storage.by_token()}
        if ways:
            raise InputError(
                f"this cache holds its tokens as {ways.pop()!r}, and the caches of this manager as {self.spec.storage!r}; fork it "
                "with the manager that made it"
            )
        spec = replace(self.spec, policy=tuple(layer.given for layer in layers))
        return self._made(spec, layers[0].rows or 1, None, None)

    def behind(self, snapshot: PrefixSnapshot, rows: int, attention_mask: Tensor | None = None) -> Any:
        """A cache that begins with a prefix, which is pinned: the policy is about what follows it.

        Raises:
            InputError: for pads behind it under a policy that evicts.
        """
        if self.evicts and attention_mask is not None:
            check_no_pads(attention_mask)
            attention_mask = None
        cache = self._made(self._pinned(len(snapshot)), rows, attention_mask, None)
        snapshot.write_to(cache, rows)
        return cache

    def check_makes(self) -> None:
        """Raise `GeometryError` for a model that takes no cache but one of its own."""
        if self.model_makes_its_own:
            raise GeometryError(
                f"{type(self.model).__name__} takes no cache, or only one of its own making; use generate() or stream(), which "
                "leave that to it"
            )

    def for_run(self, wanted: Wanted, begin: Callable[[], PrefixSnapshot] | None) -> Any:
        """A cache for a run of `generate`; None where nothing of it would be ours.

        Args:
            wanted: what it is wanted for.
            begin: gives the prefix that it begins with; None if it begins with none.

        Raises:
            PolicyError: if the run cannot be on it.
        """
        if not wanted.supported:
            if self.matter:
                raise PolicyError(
                    f"{type(self.model).__name__} takes no cache of keys and values, so nothing of it can be bounded or "
                    "held in few bits; use KVCacheManager(model) without a policy, limit or storage"
                )
            return None
        if wanted.assisted and (self.evicts or not self.spec.storage.plain):
            raise PolicyError(
                "guessed tokens that are wrong are taken back, which needs a cache that drops and packs nothing; use a "
                "manager with KeepAll() and no storage, or generate without an assistant, prompt lookup or early exit"
            )
        if begin is not None:
            self.check_makes()
            return self.behind(begin(), wanted.rows or 1)
        cache = self.empty(wanted.rows if self.evicts else None, wanted.mask, crossing=wanted.crossing)
        return cache if kv_layers(cache, some=False) else None

    def estimate(self, tokens: int, rows: int, encoder_tokens: int | None) -> int:
        """See `KVCacheManager.estimate`."""
        if self.ranks:
            raise PolicyError(
                "what a cache takes whose heads keep tokens of their own depends on the text; ask report(cache) afterwards"
            )
        shape = shape_of(self.model)
        if shape.cross and encoder_tokens is None:
            raise InputError(
                "what attends to an encoder is held as well; give encoder_tokens, the positions that it gives for a row"
            )
        return self.spec.nbytes(shape, tokens, rows=rows, encoder_tokens=encoder_tokens or 0)

    # ------------------------------------------------------------------ inside

    def _pinned(self, tokens: int) -> CacheSpec:
        """For what follows a prefix of so many tokens."""
        policy = self.spec.policy
        given = (policy,) if isinstance(policy, SizePolicy) else policy
        pinned = tuple(Pinned(tokens, one) if one.evicts else one for one in given)
        return replace(self.spec, policy=pinned[0] if isinstance(policy, SizePolicy) else pinned)

    def _made(self, spec: CacheSpec, rows: int | None, attention_mask: Tensor | None, crossing: bool | None) -> Any:
        padding = left_padding(attention_mask) if self.evicts else None
        cache = new_cache(self.model, spec, rows=rows, padding=padding, geometry=self.geometry, crossing=crossing)
        cache.made_for = MadeFor(self._of_model.watch.now())
        return cache
