"""`KVCacheManager`: wrap a transformers model; get caches, generate, stream, trim, report."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from kvcache.cache import CacheGeometry, CacheReport, CacheSpec, Plain, PositionMode, SizePolicy, Storage, spec_of
from kvcache.decoding import LanguageDecoder, Told, TuningProfile, WarmUp, as_async, backend_on, untold
from kvcache.errors import InputError, check_whole
from kvcache.generation import GenerateCall
from kvcache.manager._batches import Batches, BatchRoom, BatchRoomFields, PromptBatch
from kvcache.manager._caches import ModelCaches
from kvcache.manager._engine import EngineCalls
from kvcache.manager._explaining import Explanation
from kvcache.manager._options import Backends, DecodeArguments, decode_options, value_of, whole_spec
from kvcache.manager._runs import Runs
from kvcache.manager._saving import fork, load, save
from kvcache.manager._streaming import Streams
from kvcache.manager._trimming import compress, trim
from kvcache.memory import release_threads
from kvcache.models import (
    check_generate_arguments,
    check_generates,
    check_model,
    check_ours,
    quantize_linear,
    report_of,
    truncate,
)
from kvcache.prefixes import PrefixCache, PrefixRegistry, check_prefix_cache, default_store


class KVCacheManager:
    """Wraps a transformers model, and never patches it: the model is afterwards what it was before.

    Args:
        model: a model with ``generate``, or a bare decoder for `new_cache` alone.
        policy: which tokens stay; one for all layers, or one per layer. Or a `CacheSpec`, which says all of a cache at once.
        max_cache_length: refuse, with a `CapacityError`, to hold more tokens than this; without it the cache grows.
        positions: ``"absolute"``, or ``"rerotated"``: the pinned tokens (sinks) move along next to the window, so that
            distances stay within what the model was trained on (StreamingLLM; RoPE models only).
        static: take a cache's memory at once, not as it grows.
        prefix_cache: where prefixes live (`add_prefix`); by default memory over disk.
        storage: how keys and values are held; by default as they come, `KVQuantization(8)` in 8 bits.
        **decoding: the fields of `kvcache.manager.DecodeOptions`: how `stream` decodes.

    Attributes:
        enabled: False makes `generate` and `stream` recompute every token: slow, the reference that a cache is measured
            against. The policy is ignored then. `generate` does the same for one call where it is given ``use_cache=False``.
        caches: makes the caches.
        engine: tells which calls the decode engine can do, and lets it do them.
        batches: what `batch` is made of.

    Raises:
        InputError: for what is no model, no `PrefixCache`, dtype, `Storage` or back end.
        PolicyError, PositionsError: if that cannot work for this model.
    """

    def __init__(
        self,
        model: Any,
        policy: CacheSpec | SizePolicy | Sequence[SizePolicy] | None = None,
        max_cache_length: int | None = None,
        *,
        positions: PositionMode = "absolute",
        static: bool = False,
        prefix_cache: PrefixCache | None = None,
        storage: Storage | None = None,
        **decoding: Unpack[DecodeArguments],
    ) -> None:
        check_model(model)
        check_prefix_cache(prefix_cache)
        options = decode_options(decoding)
        self.model = model
        self.backend: Backends = options.backend
        self.enabled = True
        held = Plain() if storage is None else storage
        spec = CacheSpec(spec_of(policy).policy, max_cache_length, positions, held, static)
        if isinstance(policy, CacheSpec):
            spec = whole_spec(policy, spec)
        self.caches = ModelCaches(model, spec)
        backend_on(options.backend, self.geometry.device)
        self.prefix_cache = PrefixCache(default_store(self.geometry.device)) if prefix_cache is None else prefix_cache
        decoder = LanguageDecoder(model, options.kv_dtype, spec.max_length, options.bucket)
        self.engine = EngineCalls(self.caches, decoder)
        self._prompts = PrefixRegistry(model, self.prefix_cache, spec.max_length, self.geometry.max_positions)
        self._runs = Runs(self.caches, self._prompts)
        self._streams = Streams(self.engine, self._runs)
        self.batches = Batches(self.caches, self.engine, self._runs, self._prompts)
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
    def observed_model(self) -> Any:
        """What to call in a loop of your own: the model, or where the policy ranks tokens a copy that shares its weights.

        A copy is of the model as it is now: ask again after a change of the model.

        Raises:
            PolicyError: if the model has changed into one that cannot be copied faithfully.
        """
        return self.caches.observed_model

    @property
    def geometry(self) -> CacheGeometry:
        """The sizes of the model's cache."""
        return self.caches.geometry

    @property
    def policy(self) -> SizePolicy | Sequence[SizePolicy]:
        """Which tokens stay; one for all layers, or one per layer."""
        return self.caches.spec.policy

    @property
    def max_cache_length(self) -> int | None:
        """The most tokens that a cache holds; None where it grows."""
        return self.caches.spec.max_length

    @property
    def positions(self) -> PositionMode:
        """``"absolute"``, or ``"rerotated"``."""
        return self.caches.spec.positions

    @property
    def spec(self) -> CacheSpec:
        """What is asked of its caches, as one value."""
        return self.caches.spec

    # ------------------------------------------------------------------ caches

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
        with self.caches.one_model(runs=False):
            self.caches.check_makes()
            if prefix is None:
                return self.caches.empty(batch_size, attention_mask)
            return self.caches.behind(self._prompts.snapshot(prefix), batch_size, attention_mask)

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
        return self.caches.estimate(tokens, batch_size, encoder_tokens)

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
        return trim(self.caches, cache, max_tokens)

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
        return save(self.caches, cache, secret)

    def load(self, data: bytes, secret: bytes | None = None) -> Any:
        """The cache that `save` wrote, under the same model and policy; it goes on exactly where it stood.

        Raises:
            CorruptError: if one byte has changed, the parts do not fit together or the model, or are not finite.
            InputError: if it is of another model or policy.
        """
        return load(self.caches, data, secret)

    def fork(self, cache: Any) -> Any:
        """A copy of a cache, which goes on by itself."""
        return fork(self.caches, cache)

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
        return compress(self.caches, cache, inputs, max_tokens, instruction)

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

    # ------------------------------------------------------------------ generate, stream

    def generate(self, inputs: Tensor | None = None, *, prefix: str | None = None, **kwargs: Any) -> Any:
        """`model.generate` with a managed cache: the same arguments, the same result.

        A `generate` that calls itself, as Whisper's does for each part of a long text, gets a new cache for each run; the
        report is then about the last.

        Args:
            inputs: token ids ``[rows, tokens]``, or the model's own first argument, which may be given by its name as well.
            prefix: the name of one added with `add_prefix`: the result is as if it stood before each row of the inputs,
                and is in the result where they are. Rows may be padded on the left, if nothing is evicted.
            **kwargs: as the model's own.

        Raises:
            InputError: for an unknown prefix, or inputs that it cannot stand before; for a ``cache_implementation``.
            PolicyError: where tokens shall leave, or be held in few bits, and the model or the way to generate does not
                allow it.
        """
        check_generates(self.model)
        return self._runs.generate(self._call(inputs, kwargs), prefix, cached=self.enabled)

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
                between chunks: ``"eager"``, ``"compile"``, ``"graph"``, ``"graph+compile"`` (see `kvcache.decoding.Decoding`), and
                ``"auto"``, which is graph on a CUDA GPU and eager elsewhere. What they cannot do `generate` does, see `explain`.

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
        with self.caches.one_model(runs=False):
            backend = backend_on(self.backend if backend is None else backend, self.geometry.device)
            call = self._call(inputs, kwargs)
            return self._streams.begin(call, prefix, backend, chunk_size, cached=self.enabled)

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
            inputs, **kwargs: of a request, as in `generate`: token ids ``[rows, tokens]``.
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

        warming = WarmUp(self.engine.decoder.programs, run)
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
        """`stream` for an event loop: chunks ``[rows, n]``. Cancelling ends the run."""
        return as_async(self.stream(inputs, prefix=prefix, chunk_size=chunk_size, backend=backend, **kwargs))

    def batch(
        self, room: BatchRoom | None = None, *, backend: Backends | None = None, **fields: Unpack[BatchRoomFields]
    ) -> AbstractContextManager[PromptBatch]:
        """A batch in which prompts of any length decode together, each of which comes and goes when it does.

        Its memory, and what was captured or compiled for it, waits for the next batch of the same size; see `release`.
        `TextScheduler` serves many clients with one.

        Args:
            room: for how many; or the fields of `BatchRoom` as keywords.
            backend: as in `stream`; ``"off"`` is eager here.

        Raises:
            InputError: if this model or its policy does not decode on the engine, with the reason.
            CapacityError: if the budget does not hold one row.
        """
        if not self.enabled:
            raise InputError("the cache is disabled, and a batch decodes on nothing else; set enabled=True")
        room = value_of(BatchRoom, room, fields, "a batch")
        return self.batches.prompts(room, self.backend if backend is None else backend)

    def explain(
        self, inputs: Tensor | None = None, *, prefix: str | None = None, backend: Backends | None = None, **kwargs: Any
    ) -> Explanation:
        """How `stream` would decode this: on the decode engine, or by `generate` and why, before anything runs.

        Args:
            inputs, prefix, backend, **kwargs: as in `stream`: token ids ``[rows, tokens]``.
        """
        named = backend_on(self.backend if backend is None else backend, self.geometry.device)
        return self._streams.explain(self._call(inputs, kwargs), prefix, named, cached=self.enabled)

    def release(self) -> None:
        """Let go of what waits for the next `stream`: a cache, and what was captured or compiled for it."""
        self.engine.decoder.release()

    def report(self, cache: Any = None) -> CacheReport:
        """The account of `cache`, or of the run that is under way or was last: bytes, tokens seen and kept, evictions.

        Raises:
            GeometryError: for a cache that is none of ours.
        """
        check_ours(cache)
        return self._runs.report() if cache is None else report_of(cache)

    def _call(self, inputs: Tensor | None, settings: Mapping[str, Any]) -> GenerateCall:
        return GenerateCall.of(self.model, self.geometry, inputs, settings)
