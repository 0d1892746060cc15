"""`KVCacheManager`: wrap a transformers model; get caches, generate, stream, trim, report."""

import copy
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from kvcache.cache import (
    CacheGeometry,
    CacheReport,
    CacheSpec,
    KeepAll,
    KVzip,
    Pinned,
    Plain,
    PositionMode,
    SizePolicy,
    Storage,
    check_states,
    compress,
    read_saved,
    restore_layers,
    save_layers,
)
from kvcache.decoding import (
    BUCKET,
    BackendName,
    GenerationSettings,
    LanguageDecoder,
    Told,
    TuningProfile,
    WarmUp,
    as_async,
    backend_on,
    check_bucket,
    chunked,
    from_worker,
    untold,
)
from kvcache.errors import GeometryError, InputError, PolicyError, check_whole
from kvcache.events import Event, emit
from kvcache.generation import STEPWISE, Emitter, Wanted, asks, mode_of, own_way, running, speaker
from kvcache.memory import release_threads
from kvcache.models import (
    BESIDE_TEXT,
    Following,
    MadeFor,
    ManagedCache,
    cache_kwarg,
    cache_layers,
    check_continues,
    check_generate_arguments,
    check_generates,
    check_kv_dtype,
    check_model,
    check_named,
    check_ours,
    check_positions,
    check_ranking,
    emit_evictions,
    exact_windows,
    facts_of,
    geometry_of,
    kv_layers,
    left_padding,
    model_fingerprint,
    new_cache,
    note_read,
    observed_copy,
    output_cache,
    pop_cache,
    quantize_linear,
    rehearse,
    report_of,
    reset_eviction_count,
    shape_of,
    structural_copy,
    takes,
    truncate,
)
from kvcache.prefixes import PrefixRegistry, SpeakerCache, check_prefix_cache, default_store

# ``[rows, tokens]``: which are text, which stand for a picture.
_KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# What can be given behind a prefix: inputs, and settings of `generate`. All else is for the model.
_KNOWN_BEHIND_A_PREFIX = (
    {"input_ids", "inputs_embeds", "attention_mask", "use_cache", *_KINDS_OF_TOKENS, *BESIDE_TEXT}
    | set(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    | set(inspect.signature(GenerationMixin.generate).parameters)
) - {"kwargs"}

Backends = BackendName | Literal["auto", "off"]

F = TypeVar("F", bound=Callable[..., Any])


def _of_one_model(runs: bool) -> Callable[[F], F]:
    """Whether the model has changed is asked once, at the begin; what it changes of itself while it runs is learned."""

    def decorate(method: F) -> F:
        @wraps(method)
        def run(self: "KVCacheManager", *args: Any, **kwargs: Any) -> Any:
            with self._from_model.watch.running(runs):
                return method(self, *args, **kwargs)

        return cast(F, run)

    return decorate


class KVCacheManager:
    """Wraps a transformers model, and never patches it: the model is afterwards what it was before.

    Args:
        model: a model with ``generate``, or a bare decoder for `new_cache` alone.
        policy: which tokens stay; one for all layers, or one per layer.
        max_cache_length: refuse, with a `CapacityError`, to hold more tokens than this; without it the cache grows.
        positions: ``"absolute"``, or ``"rerotated"``: the pinned tokens (sinks) move along next to the window, so that
            distances stay within what the model was trained on (StreamingLLM; RoPE models only).
        preallocate: take a cache's memory at once, not as it grows.
        speakers: where prefixes live (`add_prefix`); by default memory over disk.
        kv_dtype: of the cache that ``stream(backend=…)`` decodes on; by default the model's.
        storage: how keys and values are held; `KVQuantization(8)` holds them in 8 bits.
        backend: what `stream` decodes with where it is given none.
        bucket: slots that a captured graph reads, or a multiple of so many, see `kvcache.decoding.Decoding`.

    Raises:
        InputError: for what is no model, no `SpeakerCache`, dtype, `Storage` or back end.
        PolicyError, PositionsError: if that cannot work for this model.
    """

    def __init__(
        self,
        model: Any,
        policy: SizePolicy | Sequence[SizePolicy] | None = None,
        max_cache_length: int | None = None,
        *,
        positions: PositionMode = "absolute",
        preallocate: bool = False,
        speakers: SpeakerCache | None = None,
        kv_dtype: torch.dtype | None = None,
        storage: Storage | None = None,
        backend: Backends = "off",
        bucket: int = BUCKET,
    ) -> None:
        check_model(model)
        check_prefix_cache(speakers)
        check_kv_dtype(kv_dtype)
        check_bucket(bucket)
        self.model = model
        self.policy: SizePolicy | Sequence[SizePolicy] = KeepAll() if policy is None else policy
        self.max_cache_length = max_cache_length
        self.positions: PositionMode = positions
        self.preallocate = preallocate
        self.backend: Backends = backend
        self.enabled = True
        self.spec = CacheSpec(
            (policy if isinstance(policy, SizePolicy) else tuple(policy)) if policy is not None else KeepAll(),
            max_cache_length,
            positions,
            Plain() if storage is None else storage,
            preallocate,
        )
        self._last = CacheReport(())
        self._running: weakref.ref[Any] | None = None  # the cache of a run that is under way
        # Says now, not at the first request, what cannot work.
        first = new_cache(model, self.spec)
        self._observed = any(kv.by_head for kv in kv_layers(first, some=False))
        self._from_model = Following(model, self._make)
        geometry = self._from_model.now().geometry
        backend_on(backend, geometry.device)
        self.speakers = SpeakerCache(default_store(geometry.device)) if speakers is None else speakers
        self._decoder = LanguageDecoder(model, kv_dtype, max_cache_length, bucket)
        self._prompts = PrefixRegistry(model, self.speakers, max_cache_length, geometry.max_positions)
        release_threads()  # who has loaded the model may not be who decodes

    @classmethod
    def from_profile(cls, model: Any, path: Path | str, **overrides: Any) -> "KVCacheManager":
        """A manager with the setting that `kvcache tune` found for this model.

        What it decodes with is the default of `stream`; where the profile has a precision, it wraps a copy of the model in
        that. How many requests to decode together is `TuningProfile.setting.requests`, and the caller's to do.

        Args:
            model: that the profile is of, as it was then.
            path: of the profile.
            **overrides: arguments of the constructor, which go before what the profile says.

        Raises:
            InputError: if it cannot be read, or is another model's.
            CorruptError: if that is no profile.
        """
        arguments = {**TuningProfile.load(path, model).arguments, **overrides}
        precision = arguments.pop("precision", None)
        return cls(model if precision is None else quantize_linear(model, precision), **arguments)

    def __repr__(self) -> str:
        limit = "" if self.max_cache_length is None else f", max_cache_length={self.max_cache_length}"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {self.policy!r}{limit}, positions={self.positions!r})"
        )

    @property
    def runner(self) -> Any:
        """What to call in a loop of your own: the model, or where the policy ranks tokens a copy that shares its weights.

        A copy is of the model as it is now: ask again after a change of the model.

        Raises:
            PolicyError: if the model has changed into one that cannot be copied faithfully.
        """
        return self._from_model.now().runner

    @property
    def geometry(self) -> CacheGeometry:
        """The sizes of the model's cache."""
        return self._from_model.now().geometry

    def _make(self) -> "_FromModel":
        geometry = geometry_of(self.model)
        if self._observed:
            runner = observed_copy(self.model)
            check_ranking(self.model, runner)
            return _FromModel(geometry, runner)
        signature = self._from_model.watch.signature()
        if signature.compiled and signature.why_no_copy is None and self._evicts:
            # Masks are put in by hooks, which compiled modules may not run.
            return _FromModel(geometry, structural_copy(self.model, lambda name, module: None))
        return _FromModel(geometry, self.model)

    @property
    def _evicts(self) -> bool:
        policies = [self.policy] if isinstance(self.policy, SizePolicy) else self.policy
        return any(policy.evicts for policy in policies)

    # ------------------------------------------------------------------ caches

    @_of_one_model(runs=False)
    def new_cache(self, batch_size: int = 1, attention_mask: Tensor | None = None, *, prefix: str | None = None) -> Any:
        """An empty cache, or one that begins with a prefix, to pass to the model as ``past_key_values``, or ``cache`` from transformers 5.24 on.

        Args:
            batch_size: rows, counting beams.
            attention_mask: ``[batch, tokens]``; needed where rows are padded on the left and the policy evicts, so that
                pads leave first and are never taken for attention sinks.
            prefix: the name of one added with `add_prefix`. It is pinned: the policy is about what follows it.

        Raises:
            InputError: for an unknown prefix, or pads behind one under a policy that evicts.
            CapacityError: if the prefix does not fit.
            GeometryError: for a model that takes no cache but one of its own.
        """
        check_whole("batch_size", batch_size, 1)
        if self._own_cache:
            raise GeometryError(
                f"{type(self.model).__name__} takes no cache, or only one of its own making; use generate() or stream(), which "
                "leave that to it"
            )
        snapshot = None if prefix is None else self._prompts.snapshot(prefix)
        if snapshot is not None and self._evicts and attention_mask is not None:
            self._refuse_pads(attention_mask)
            attention_mask = None
        cache = self._empty_cache(
            batch_size, attention_mask, self.policy if snapshot is None else self._pinned(len(snapshot))
        )
        if snapshot is not None:
            snapshot.fork(cache, batch_size)
        return cache

    def estimate(self, tokens: int, batch_size: int = 1, *, encoder_tokens: int | None = None) -> int:
        """Bytes that a cache takes after `tokens` per row, exactly, with all of its layers; before anything is allocated.

        Args:
            tokens: per row, pads among them.
            batch_size: rows, counting beams.
            encoder_tokens: of an encoder-decoder: positions that its encoder gives for each row, which are held as well.

        Raises:
            InputError: for an encoder-decoder without them.
            PolicyError: if that depends on the text, as where heads keep tokens of their own.
            GeometryError: if the model does not show what its cache holds.
        """
        check_whole("tokens", tokens, 0)
        check_whole("batch_size", batch_size, 1)
        if self._observed:
            raise PolicyError(
                "what a cache takes whose heads keep tokens of their own depends on the text; ask report(cache) afterwards"
            )
        shape = shape_of(self.model)
        if shape.cross and encoder_tokens is None:
            raise InputError(
                "what attends to an encoder is held as well; give encoder_tokens, the positions that it gives for a row"
            )
        return self.spec.nbytes(shape, tokens, rows=batch_size, encoder_tokens=encoder_tokens or 0)

    def truncate(self, cache: Any, length: int) -> None:
        """Roll `cache` back to its first `length` tokens, or reset it to a pinned prefix, without reallocating.

        Raises:
            RollbackError: if tokens have been evicted from what should remain.
        """
        truncate(cache, length)

    def trim(self, cache: Any, max_tokens: int | None = None) -> int:
        """Evict unpinned tokens of `cache` now, at a moment of your choice, and give back the memory they took.

        The oldest leave, or under a policy that ranks those that are worth least.

        Args:
            cache: one of ours.
            max_tokens: how many stay in a row; by default what the policy trims to (nothing leaves under `KeepAll`).

        Returns:
            How many left, of each row, in the layer that lost most.

        Raises:
            PositionsError: if this model's tokens cannot be evicted.
            PolicyError: if more than `max_tokens` are pinned.
        """
        layers = kv_layers(cache)
        if max_tokens is not None:
            self.geometry.check_eviction()
            for layer in layers:
                layer.check_trim(max_tokens)
        left = [layer.trim(max_tokens) for layer in layers]
        for layer in layers:
            layer.shrink_to_fit()
        self._tell_trimmed(cache, left)
        return max(left)

    def save(self, cache: Any, secret: bytes | None = None) -> bytes:
        """A whole cache as a checked safetensors file, compressed as it is, to go on from later or elsewhere.

        Args:
            cache: one of ours, of rows without pads.
            secret: sign the file with it, see `kvcache.cache.pack`.

        Raises:
            GeometryError: if the model manages some of its layers itself, or rows have pads.
            InputError: if the model cannot be told from others, see `model_fingerprint`, or has changed since the cache was
                made.
        """
        then = cache.made_for.then if isinstance(cache, ManagedCache) else None
        if then is not None and self._from_model.watch.changed_since(then):
            raise InputError(
                "the model has changed since this cache was made, and what it holds is of the model as it was; save a cache "
                "before its model changes, or fill a new one"
            )
        return self._saved(cache, model_fingerprint(self.model), secret)

    def _saved(self, cache: Any, model: str, secret: bytes | None) -> bytes:
        layers = kv_layers(cache)
        if len(layers) != len(cache_layers(cache)) or self.model.config.is_encoder_decoder:
            raise GeometryError(
                f"{type(self.model).__name__} keeps a part of its cache in its own way, which cannot be saved"
            )
        return save_layers(layers, model, layers[0].rows or 1, secret)

    def load(self, data: bytes, secret: bytes | None = None) -> Any:
        """The cache that `save` wrote, under the same model and policy; it goes on exactly where it stood.

        Raises:
            CorruptError: if one byte has changed, the parts do not fit together or the model, or are not finite.
            InputError: if it is of another model or policy.
        """
        tensors, header = read_saved(data, model_fingerprint(self.model), secret)
        check_states(tensors, self.geometry)  # whoever wrote it
        return self._restored(tensors, header)

    def _restored(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> Any:
        cache = self._empty_cache(header["rows"])
        restore_layers(kv_layers(cache), tensors, header, self.geometry.device)
        return cache

    def fork(self, cache: Any) -> Any:
        """A copy of a cache, which goes on by itself."""
        copied = self._restored(*read_saved(self._saved(cache, "", None), ""))
        copied.made_for = cache.made_for
        return copied

    @torch.no_grad()
    def compress(self, cache: Any, inputs: Tensor, max_tokens: int, *, instruction: Tensor | None = None) -> int:
        """Read a text that `cache` holds a second time and keep what was looked at most (KVzip, arXiv:2505.23416).

        Where the policy is `AdaKV`, all heads of all layers share the budget.

        Args:
            cache: one of ours under a `KVzip` policy, of which nothing has left, after the text has been run on it.
            inputs: the text again: token ids ``[rows, tokens]``.
            max_tokens: how many tokens a head keeps on average.
            instruction: token ids ``[1, tokens]`` to put before it, for example of "Repeat the previous context exactly.".

        Returns:
            How many tokens left, a head, on average.

        Raises:
            InputError: if the cache holds another number of tokens or rows.
            PolicyError: if its policy is another, or protects more than `max_tokens`.
        """
        layers = kv_layers(cache)
        given = tuple(inputs.shape) if isinstance(inputs, Tensor) else inputs
        if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.shape[1] != layers[0].seen:
            raise InputError(
                f"inputs {given} must be the token ids [rows, {layers[0].seen}] that the cache has seen: they are read again"
            )
        if not all(isinstance(layer.policy.ranking, KVzip) for layer in layers):
            raise PolicyError(
                f"compress() needs a cache under KVzip, or AdaKV(KVzip(…)), got {layers[0].policy!r}; "
                "under other policies tokens leave by themselves, or by trim()"
            )
        if layers[0].padding is not None or inputs.shape[0] != layers[0].rows:
            raise InputError(
                f"the cache holds {layers[0].rows} rows, {given[0]} were given; rows that were padded must be run apart"
            )
        if any(min(layer.heads or (layer.stored,)) < layer.seen for layer in layers):
            raise InputError("tokens have left this cache already; give KVzip a limit that holds the whole text")
        for layer in layers:
            layer.check_trim(max_tokens)
        before, evicted = [layer.stored for layer in layers], [layer.evicted for layer in layers]
        rehearse(self.runner, cache, inputs.to(self.model.device), instruction)
        compress(layers, max_tokens)
        self._tell_trimmed(cache, [layer.evicted - then for layer, then in zip(layers, evicted, strict=True)])
        return max(0, before[0] - max_tokens)

    def _tell_trimmed(self, cache: Any, left: Sequence[int]) -> None:
        reset_eviction_count(cache)
        layers, total = kv_layers(cache), sum(left)
        if total:
            rows = layers[0].rows or 1
            numbers = {"tokens": total * rows, "layers": sum(n > 0 for n in left), "rows": rows, "seen": layers[0].seen}
            emit(Event("trimmed", repr(layers[0].policy), numbers))

    # ------------------------------------------------------------------ prefixes

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The names of the prefixes added so far."""
        return tuple(self._prompts)

    def add_prefix(self, name: str, prefix: Tensor, *, pin: bool = False) -> None:
        """Compute a beginning that many requests share (a system prompt, examples), or find it where it was kept.

        What it has in common with a prefix already in memory is not computed again.

        Args:
            name: for ``generate(prefix=name)`` and the like; one that exists is replaced, which the event ``"replaced"``
                and the log say where it stood for another content.
            prefix: token ids ``[tokens]`` or ``[1, tokens]``, or embeddings ``[tokens, dim]`` or ``[1, tokens, dim]``.
            pin: never evict it.

        Raises:
            InputError: if that is no prefix, the model cannot read it, or it is in training mode.
            GeometryError, PositionsError: if this model's prefixes cannot be reused.
            CapacityError: if the prefix alone is longer than `max_cache_length`, or the model's table of positions.
        """
        self._prompts.add(name, prefix, pin)

    def remove_prefix(self, name: str) -> None:
        """Forget a name. What was computed for it stays in the store until it is evicted there.

        Raises:
            InputError: for an unknown name.
        """
        self._prompts.remove(name)

    # ------------------------------------------------------------------ on and off

    def enable_kv_cache(self) -> None:
        """Use caches again (the default)."""
        self.enabled = True

    def disable_kv_cache(self) -> None:
        """Recompute every token: slow, the reference that a cache is measured against. Ignores the policy."""
        self.enabled = False

    # ------------------------------------------------------------------ generate, stream

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *, prefix: str | None = None, **kwargs: Any) -> Any:
        """`model.generate` with a managed cache: the same arguments, the same result.

        A `generate` that calls itself, as Whisper's does for each part of a long text, gets a new cache for each run; the
        report is then about the last.

        Args:
            inputs: as the model's own first argument, which may be given by its name as well.
            prefix: the name of one added with `add_prefix`: the result is as if it stood before each row of the inputs,
                and is in the result where they are. Rows may be padded on the left, if nothing is evicted.
            **kwargs: as the model's own.

        Raises:
            InputError: for an unknown prefix, or inputs that it cannot stand before; for a ``cache_implementation``.
            PolicyError: where tokens shall leave, or be held in few bits, and the model or the way to generate does not
                allow it.
        """
        check_generates(self.model)
        return self._generate(inputs, prefix, kwargs)

    @_of_one_model(runs=False)
    def stream(
        self,
        inputs: Tensor | None = None,
        *,
        prefix: str | None = None,
        chunk_size: int = 16,
        backend: Backends | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """The new tokens of `generate`, in chunks ``[batch, n]`` of `chunk_size` as they come; the last may be shorter.

        Rows that have ended are filled with the pad token, as `generate` does. Closing the iterator ends the run. Where a
        token has several numbers, as those of CSM and Dia, chunks are ``[batch, n, codebooks]``. They are as the model draws
        them, step by step: where it delays its codebooks against each other, as MusicGen and Dia do, so do they.

        Args:
            inputs, prefix, **kwargs: as in `generate`. A ``streamer`` gets its tokens as well.
            chunk_size: tokens in a chunk.
            backend: by default the manager's own. ``"off"`` lets `generate` run each token. The others decode in whole steps, without a look at the host
                between chunks: ``"eager"``, ``"compile"``, ``"graph"``, ``"graph+compile"`` (see
                `kvcache.decoding.Decoding`), and ``"auto"``, which is graph on a CUDA GPU and eager elsewhere. What they cannot
                do `generate` does, and the report says why.

        Raises:
            InputError: for beams and other ways whose tokens are only known at the end, settings that `generate` refuses, a
                chunk size below 1, an unknown prefix, or a backend that is unknown or not there on this device. While
                iterating: if the model takes another run for these inputs, or a token cannot be drawn from its logits.
            CapacityError: while iterating, where a limit is reached, after all tokens that there was room for. It may be
                known before, but a text may also end before it.
        """
        check_whole("chunk_size", chunk_size, 1)
        check_generates(self.model)
        check_generate_arguments(self.model, kwargs)
        backend = self._backend if backend is None else backend_on(backend, self.geometry.device)
        self._check_stream(prefix, kwargs)
        reason: str | None = None
        if backend != "off":
            settings = self._settings(inputs, prefix, kwargs)
            if isinstance(settings, GenerationSettings):
                return self._decoded(settings, inputs, prefix, chunk_size, backend, kwargs)
            reason = settings
            emit(Event("fell_back", f"{backend} to generate", reason=reason))

        def work(emit: Callable[[Tensor], None]) -> None:
            told = 0

            def count(token: Tensor) -> None:
                nonlocal told
                told += 1
                emit(token)

            self._generate(inputs, prefix, kwargs, count)
            if not told:
                raise InputError(
                    f"the generate of {type(self.model).__name__} tells a streamer nothing, so nothing can be streamed; use generate()"
                )
            self._last = replace(self._last, fallback=reason)

        return chunked(from_worker(work), chunk_size)

    def warm_up(
        self,
        inputs: Tensor,
        *,
        backend: Backends | None = None,
        background: bool = False,
        told: Told = untold,
        **kwargs: Any,
    ) -> WarmUp:
        """Do what a first request such as this would wait for: its compiled step is loaded from its file or made.

        It runs the request's beginning. One with another length of cache, number of rows, or from greedy to sampling has a
        compiled step of its own; with `max_cache_length` the cache of all has the same length.

        Args:
            inputs, **kwargs: of a request, as in `generate`.
            backend: see `stream`.
            background: return at once and do it in a thread. From then on no request waits for a compiler: it runs eagerly
                until its compiled step is there, and says the same tokens.
            told: is told what is done next, in the thread that does it.

        Returns:
            What was made and how long that took, see `WarmUp`.

        Raises:
            InputError: as `stream`, before anything has run.
        """
        stream = self.stream(inputs, backend=backend, chunk_size=2, **kwargs)

        def run() -> None:
            told("decoding the first tokens")
            with closing(cast(Any, stream)) as begun:
                next(begun, None)

        warming = WarmUp(self._decoder.programs, run)
        return warming.in_background() if background else warming.here()

    def astream(
        self,
        inputs: Tensor | None = None,
        *,
        prefix: str | None = None,
        chunk_size: int = 16,
        backend: Backends | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Tensor]:
        """`stream` for an event loop. Cancelling ends the run."""
        return as_async(self.stream(inputs, prefix=prefix, chunk_size=chunk_size, backend=backend, **kwargs))

    def told(self, logits: Tensor, cache: Any, ids: Tensor) -> Tensor:
        """The logits ``[n, vocabulary]`` after each of these token ids ``[n]`` on the decode engine's cache, which begins as
        `cache`; to judge by what a ``kv_dtype`` costs.

        Args:
            logits: of the last position in the cache, ``[1, vocabulary]``.
            cache: of one row.

        Raises:
            GeometryError: if the engine cannot decode this model.
        """
        return self._decoder.told(logits, cache, ids)

    def unsupported_reason(
        self, inputs: Tensor | None = None, *, prefix: str | None = None, **kwargs: Any
    ) -> str | None:
        """Why `stream` would not decode this on the decode engine, but by `generate`; None if it would.

        Args:
            inputs, prefix, **kwargs: as in `generate`.
        """
        settings = self._settings(inputs, prefix, kwargs)
        return settings if isinstance(settings, str) else None

    def release(self) -> None:
        """Let go of what waits for the next ``stream(backend=…)``: a cache, and what was captured or compiled for it."""
        self._decoder.release()

    def report(self, cache: Any = None) -> CacheReport:
        """The account of `cache`, or of the run that is under way or was last: bytes, tokens seen and kept, evictions.

        Raises:
            GeometryError: for a cache that is none of ours.
        """
        check_ours(cache)
        running = self._running if cache is None else None
        cache = running() if running is not None else cache
        return self._last if cache is None else report_of(cache)

    # ------------------------------------------------------------------ inside

    @torch.no_grad()
    @_of_one_model(runs=True)
    def _generate(
        self,
        inputs: Tensor | None,
        prefix: str | None,
        kwargs: dict[str, Any],
        emit: Callable[[Tensor], None] | None = None,
    ) -> Any:
        """`generate`, which tells its tokens one by one where somebody takes them."""
        if prefix is not None:
            inputs, kwargs = self._prefixed(prefix, inputs, kwargs)
            facts_of(self.model).clear_request_state()
        self._refuse_cache_of_another_kind(kwargs)
        on = self.enabled and kwargs.get("use_cache") is not False
        kwargs = dict(kwargs)
        given = pop_cache(kwargs) if on else None
        if given is not None:
            self._check_continues(given, inputs, kwargs)
            note_read(given, None)
        mine: list[weakref.ref[Any]] = []

        def make(wanted: Wanted) -> Any:
            cache = self._cache(wanted, prefix)
            if cache is not None:
                self._running = weakref.ref(cache)
                mine.append(self._running)
            return cache

        model = self.runner if on else self.model
        if (
            on and given is None and not asks(model, self.geometry)
        ):  # a model of another kind takes the one it is handed
            given = self._cache(Wanted(None, None, self.model.config.is_encoder_decoder, False, True), prefix)
        first = () if inputs is None else (inputs,)  # under whichever name the model has for it
        with running(model, self.geometry, make, given) as run:
            if emit is not None:
                run.streamer = Emitter(emit, run, self._rows(inputs, kwargs), kwargs.get("streamer"))
                kwargs["streamer"] = run.streamer
            if not on:
                self._last = CacheReport((), enabled=False)
                return run.model.generate(*first, **_caching(False, kwargs))
            if given is not None:
                self._running = weakref.ref(given)
                mine.append(self._running)
                kwargs |= cache_kwarg(model, given)
            try:
                with self._exactly():
                    # Said aloud: where a config turns caches off, `generate` would ignore the one it is given.
                    out = run.model.generate(*first, **_caching(True, kwargs))
                if run.cache is not None:
                    self._note_read(run.cache, self._prompt(inputs, kwargs), kwargs, out)
            except IndexError:
                self._check_positions(run.cache, inputs, kwargs)
                raise
            finally:
                if run.cache is not None:
                    self._last = report_of(run.cache)
                    emit_evictions(run.cache)
                if self._running in mine:
                    self._running = None
            if not run.asked and given is None and self._matters:
                raise GeometryError(
                    f"{type(self.model).__name__} made its cache itself, so what this manager was asked to keep and drop did "
                    "not happen; use KVCacheManager(model) without a policy or limit, or a loop of your own with new_cache()"
                )
            return out

    def _check_positions(self, cache: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Some models look into their table of positions before they ask the cache, and find nothing there."""
        if cache is not None:
            prompt = self._prompt(inputs, kwargs)
            seen = cache_layers(cache)[0].get_seq_length()
            fresh = 1 if prompt is None else max(1, prompt.shape[1] - seen)
            check_positions(self.geometry.max_positions, seen, fresh)

    def _refuse_cache_of_another_kind(self, kwargs: dict[str, Any]) -> None:
        """What a checkpoint's config asks for is a default, which this manager stands for; what a request asks for is not."""
        configs = kwargs.get("generation_config"), self._generation_config
        asked, default = (getattr(config, "cache_implementation", None) for config in configs)
        kind = kwargs.get("cache_implementation") or (asked if asked != default else None)
        if kind not in (None, "dynamic", "dynamic_full"):
            raise InputError(
                f"cache_implementation={kind!r} asks for another cache than this manager's; leave it out, or call "
                "model.generate(), which makes that one"
            )

    @property
    def _backend(self) -> BackendName | Literal["off"]:
        return backend_on(self.backend, self.geometry.device)

    @property
    def _generation_config(self) -> Any:
        return getattr(speaker(self.model, self.geometry), "generation_config", None)

    @property
    def _matters(self) -> bool:
        """Whether a run would go, or end, another way on the model's own cache."""
        return self._evicts or self.max_cache_length is not None or not self.spec.storage.exact

    def _cache(self, wanted: Wanted, prefix: str | None) -> Any:
        """A new cache for a run of `generate`; None where nothing of it would be ours."""
        if not wanted.supported:
            if self._matters:
                raise PolicyError(
                    f"{type(self.model).__name__} takes no cache of keys and values, so nothing of it can be bounded or "
                    "held in few bits; use KVCacheManager(model) without a policy, limit or quantization"
                )
            return None
        if wanted.assisted and (self._evicts or not self.spec.storage.exact):
            raise PolicyError(
                "guessed tokens that are wrong are taken back, which needs a cache that drops and packs nothing; use a "
                "manager with KeepAll() and no quantization, or generate without an assistant, prompt lookup or early exit"
            )
        if prefix is not None:
            return self.new_cache(wanted.rows or 1, prefix=prefix)
        cache = self._empty_cache(wanted.rows if self._evicts else None, wanted.mask, crossing=wanted.crossing)
        return cache if kv_layers(cache, some=False) else None

    def _empty_cache(
        self,
        rows: int | None,
        attention_mask: Tensor | None = None,
        policy: SizePolicy | tuple[SizePolicy, ...] | None = None,
        crossing: bool | None = None,
    ) -> Any:
        """A cache for so many rows, padded as the mask says, under this manager's policy or another."""
        spec = self.spec if policy is None else replace(self.spec, policy=policy)
        cache = new_cache(
            self.model,
            spec,
            rows=rows,
            padding=left_padding(attention_mask) if self._evicts else None,
            geometry=self.geometry,
            crossing=crossing,
        )
        cache.made_for = MadeFor(self._from_model.watch.now())
        return cache

    def _check_stream(self, prefix: str | None, kwargs: dict[str, Any]) -> None:
        """Refuse what is no stream of tokens, before anything runs."""
        if prefix is not None:
            self._prompts[prefix]
        module = speaker(self.model, self.geometry)
        if module is None:
            return
        mode = mode_of(module, kwargs)
        name = mode.value.replace("_", " ")
        if "beam" in mode.value:
            raise InputError(
                "beams cannot be streamed: their tokens are known only at the end; use generate(), or num_beams=1"
            )
        if mode not in (*STEPWISE, GenerationMode.ASSISTED_GENERATION):
            raise InputError(f"{name} cannot be streamed; use generate(), or greedy search or sampling")
        if isinstance(kwargs.get("temperature"), Sequence):
            raise InputError(
                f"temperature={kwargs['temperature']!r} tries again where a text is poor, so what was streamed may be "
                "replaced; give one temperature, or use generate()"
            )

    def _settings(self, inputs: Tensor | None, prefix: str | None, kwargs: dict[str, Any]) -> GenerationSettings | str:
        """What the decode engine is to do, or why it cannot."""
        reason = self._why_not(inputs, prefix, kwargs)
        if reason is not None:
            return reason
        if prefix is not None:
            inputs, kwargs = self._prefixed(prefix, inputs, kwargs)
        with running(self.model, self.geometry, lambda wanted: None) as run:
            settings = GenerationSettings.of(run.model, inputs, kwargs)
        return settings if settings.unsupported_reason is None else settings.unsupported_reason

    @property
    def _own_cache(self) -> bool:
        """Whether the model generates without a cache, or on one of its own making."""
        mine: Any = self.model if isinstance(self.model, GenerationMixin) else None
        return mine is not None and not (mine._supports_default_dynamic_cache() and takes(mine))

    def _why_not(self, inputs: Tensor | None, prefix: str | None, kwargs: dict[str, Any]) -> str | None:
        """Why the decode engine cannot do this, whatever its settings; None if it can."""
        if not self.enabled:
            return "the cache is disabled"
        if self.positions == "rerotated" and self._evicts:
            return "re-rotated positions are turned on the host"
        if not isinstance(self.policy, SizePolicy):
            return "layers have policies of their own"
        if self._observed:
            return "tokens are ranked on the host"
        if not self.spec.storage.exact:
            return "a quantized cache is read on the host"
        if (mask := self._mask_of(inputs, kwargs)) is not None and (
            mask.dim() != 2 or not bool((mask.bool().int().diff(dim=1) >= 0).all()) or not bool(mask[:, -1].all())
        ):
            return "the attention mask hides more than pads on the left"
        if mask is not None and not bool(mask.all()):
            if prefix is not None:
                return "rows are padded behind a prefix"
            limit = self.policy.limit
            if self._evicts and (limit is None or self.policy.keep(limit + 1) < limit):
                return "pads count towards the moment at which this policy trims, and on the device there are none"
        module = speaker(self.model, self.geometry)
        if module is None:
            return f"{type(self.model).__name__} is no transformers model that generates"
        if self._own_cache:
            return f"{type(self.model).__name__} generates on a cache of its own making"
        return own_way(module) or self._decoder.unsupported_reason()

    def _mask_of(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        mask: Tensor | None = kwargs.get("attention_mask")
        return self._guess_mask(self._prompt(inputs, kwargs), kwargs) if mask is None else mask

    def _decoded(
        self,
        settings: GenerationSettings,
        inputs: Tensor | None,
        prefix: str | None,
        chunk_size: int,
        backend: BackendName,
        kwargs: dict[str, Any],
    ) -> Iterator[Tensor]:
        names = ("input_ids", "inputs_embeds", "attention_mask")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}

        def prefill() -> tuple[Tensor, Any, Sequence[Tensor], Tensor | None]:
            out = self.generate(inputs, prefix=prefix, generation_config=settings.prefill, **given)
            pads = None if prefix is not None else left_padding(self._mask_of(inputs, kwargs))
            return out.logits[0], output_cache(out), list(out.sequences[:, :-1]), pads

        for chunk, report in self._decoder.chunks(prefill, settings, backend, chunk_size):
            self._last = report
            yield chunk

    def _exactly(self) -> AbstractContextManager[None]:
        return exact_windows(self.runner) if self._evicts else nullcontext()

    def _check_continues(self, cache: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Refuse a text that a cache holds already, or that does not begin with what it holds."""
        decoder = self.model.config.is_encoder_decoder
        ids = kwargs.get("decoder_input_ids") if decoder else self._prompt(inputs, kwargs)
        mask = kwargs.get("decoder_attention_mask" if decoder else "attention_mask")
        if ids is None and not decoder:
            return
        given = 1 if ids is None else ids.shape[1]
        whole = (
            not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] <= given
        )  # else only what is new is given
        given = given if whole or mask is None else mask.shape[1]
        check_continues(cache, ids if whole and ids is not None and not ids.is_floating_point() else None, given)

    def _note_read(self, cache: Any, prompt: Tensor | None, kwargs: dict[str, Any], out: Any) -> None:
        """Remember which tokens a cache holds, where the result says it: rows as they came, ids from the beginning."""
        mask = kwargs.get("attention_mask")
        ids = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
        told = prompt is not None and prompt.dim() == 2 and not prompt.is_floating_point()
        if mask is not None and told and prompt is not None:
            told = mask.dim() == 2 and mask.shape[1] == prompt.shape[1]
        one = self._setting("num_beams", kwargs) == 1 and not self.model.config.is_encoder_decoder
        text = isinstance(ids, Tensor) and ids.dim() == 2  # and no sound, nor several numbers a token
        note_read(cache, ids if told and one and text else None)

    def _prompt(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """What the model is given to start from: token ids, embeddings, or an encoder's features or pictures."""
        names = ("decoder_input_ids", "input_ids", "inputs_embeds", getattr(self.model, "main_input_name", "input_ids"))
        return next((t for t in (*map(kwargs.get, names), inputs) if t is not None), None)

    def _rows(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> int | None:
        """Rows of a request, counting sequences that one prompt shall have; None if nothing says so."""
        encoded = kwargs.get("encoder_outputs")
        known = self._prompt(inputs, kwargs) if encoded is None else encoded[0]
        return None if known is None else known.shape[0] * self._setting("num_return_sequences", kwargs)

    def _pinned(self, tokens: int) -> SizePolicy | tuple[SizePolicy, ...]:
        """The policy for what follows a prefix of so many tokens."""
        if isinstance(self.policy, SizePolicy):
            return Pinned(tokens, self.policy) if self.policy.evicts else self.policy
        return tuple(Pinned(tokens, policy) if policy.evicts else policy for policy in self.policy)

    def _prefixed(
        self, name: str, inputs: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The inputs with the prefix before each row, as `generate` wants them even where the cache holds it already."""
        check_named(self.model)
        content = self._prompts[name].to(self.model.device)
        one_of_two = ("cache", "past_key_values", "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
        for other in (*one_of_two, "position_ids", "adapter_names"):
            if self._found(other, kwargs) is not None:
                raise InputError(
                    f"give prefix or {other}, not both; new_cache(prefix=…) makes a cache that begins with one, to be run "
                    "in a loop of your own"
                )
        unknown = sorted(name for name in kwargs if name not in _KNOWN_BEHIND_A_PREFIX and kwargs[name] is not None)
        if unknown:
            raise InputError(
                f"{unknown[0]} changes what the model computes, also of the prefix {name!r}, which was computed without it; give "
                "the prefix with the inputs, without prefix=…"
            )
        kwargs = dict(kwargs)
        ids, embeds = kwargs.pop("input_ids", inputs), kwargs.pop("inputs_embeds", None)
        if ids is not None and embeds is not None:
            raise InputError("give what follows a prefix as token ids or as inputs_embeds, not as both")
        given = ids if embeds is None else embeds
        if given is None or given.dim() != (2 if embeds is None else 3) or given.shape[1] == 0:
            raise InputError(
                f"the prefix {name!r} needs inputs to stand before: token ids [rows, tokens] or inputs_embeds "
                f"[rows, tokens, dim] with at least one token, got {None if given is None else list(given.shape)}"
            )
        rows = given.shape[0]
        for kind in _KINDS_OF_TOKENS:
            if (kinds := kwargs.get(kind)) is not None:
                kwargs[kind] = torch.cat([kinds.new_zeros(rows, content.shape[0]), kinds], 1)  # a prefix is text
        kwargs["attention_mask"] = self._mask_behind(content.shape[0], ids, given, kwargs)
        if ids is not None and not content.is_floating_point():
            ids = torch.cat([content.expand(rows, -1).to(ids.device), ids], 1)
        elif ids is not None and embeds is not None:
            raise InputError(
                f"the prefix {name!r} is embeddings: give the rest as inputs_embeds alone, without its ids"
            )
        if embeds is None and not content.is_floating_point():
            return ids, kwargs
        embed = self.model.get_input_embeddings()
        begin = content.to(self.model.dtype) if content.is_floating_point() else embed(content)
        rest = embed(given) if embeds is None else embeds
        kwargs["inputs_embeds"] = torch.cat([begin.expand(rows, -1, -1), rest.to(begin.dtype)], 1)
        return None, kwargs

    def _mask_behind(self, prefix: int, ids: Tensor | None, given: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The attention mask of prefix and inputs: the prefix is seen by all."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape != given.shape[:2]:
            raise InputError(
                f"attention_mask {list(mask.shape)} must be that of the inputs alone, {list(given.shape[:2])}: "
                "the prefix, which all of them see, is not in it"
            )
        if mask is None:
            mask = self._guess_mask(ids, kwargs)
        if mask is None:
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        if self._evicts:
            self._refuse_pads(mask)
        return torch.cat([torch.ones(mask.shape[0], prefix, dtype=mask.dtype, device=mask.device), mask], 1)

    @staticmethod
    def _refuse_pads(mask: Tensor) -> None:
        if not bool(mask.all()):
            raise InputError(
                "rows padded behind a prefix need a policy that evicts nothing: pads would count as tokens; "
                "use KeepAll(), or run rows of different lengths apart"
            )

    def _guess_mask(self, ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask that `generate` makes itself where none is given."""
        pad, ends = self._found("pad_token_id", kwargs), self._found("eos_token_id", kwargs)
        ends = ends if isinstance(ends, list) else [ends]
        if ids is None or ids.dim() != 2 or pad is None or pad in ends:
            return None
        return torch.ne(ids, pad).long()

    def _setting(self, name: str, kwargs: dict[str, Any]) -> int:
        """A whole number among the generation settings; 1 where nobody has set it."""
        value = self._found(name, kwargs)
        return 1 if value is None else int(value)

    def _found(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A generation setting as `generate` will find it."""
        configs = (kwargs.get("generation_config"), self._generation_config)
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)


def _caching(on: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `generate` with caches switched on or off: in the config where one is given, which wants no others beside it."""
    config = kwargs.get("generation_config")
    if config is None:
        return {**kwargs, "use_cache": on}
    config = copy.copy(config)
    config.use_cache = on
    return {name: value for name, value in kwargs.items() if name != "use_cache"} | {"generation_config": config}


@dataclass(frozen=True)
class _FromModel:
    """What a manager makes of its model, and makes anew when the model has changed."""

    geometry: CacheGeometry
    runner: Any
