"""Which calls of `generate` the decode engine can do, and their tokens from it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from kvcache.cache import CacheReport, SizePolicy
from kvcache.decoding import BackendName, GenerationSettings, LanguageDecoder
from kvcache.generation import GenerateCall, own_way, running, speaker
from kvcache.manager._caches import ModelCaches
from kvcache.models import left_padding, output_cache


def prefill_of(call: GenerateCall, settings: GenerationSettings, **more: Any) -> GenerateCall:
    """The call that stands for the prefill of another: it makes one token."""
    names = ("input_ids", "inputs_embeds", "attention_mask")
    given = {name: call.settings[name] for name in names if call.settings.get(name) is not None}
    return call.given(call.inputs, {**given, **more, "generation_config": settings.prefill})


class EngineCalls:
    """Calls of `generate` on the decode engine.

    Args:
        caches: what a prefill runs on.
        decoder: decodes behind it.
    """

    def __init__(self, caches: ModelCaches, decoder: LanguageDecoder) -> None:
        self._caches = caches
        self.decoder = decoder

    def unsupported_reason(self, call: GenerateCall, behind_prefix: bool = False) -> str | None:
        """Why the engine cannot do this call, whatever its settings; None if it can.

        Args:
            call: as it was given.
            behind_prefix: whether a prefix comes before its inputs.
        """
        if (reason := self._why_not_held() or self._why_not_masked(call.mask, behind_prefix)) is not None:
            return reason
        return self._why_not_run(call.module)

    def why_no_batch(self) -> str | None:
        """Why the engine can do no call at all; None if it can some."""
        return self._why_not_held() or self._why_not_run(speaker(self._caches.model, self._caches.geometry))

    def _why_not_held(self) -> str | None:
        caches = self._caches
        if caches.spec.rerotated and caches.evicts:
            return "re-rotated positions are turned on the host"
        if not isinstance(caches.spec.policy, SizePolicy):
            return "layers have policies of their own"
        if caches.ranks:
            return "tokens are ranked on the host"
        return None if caches.spec.storage.plain else "a quantized cache is read on the host"

    def _why_not_run(self, module: Any) -> str | None:
        name = type(self._caches.model).__name__
        if module is None:
            return f"{name} is no transformers model that generates"
        if self._caches.model_makes_its_own:
            return f"{name} generates on a cache of its own making"
        return own_way(module) or self.decoder.unsupported_reason()

    def _why_not_masked(self, mask: Tensor | None, behind_prefix: bool) -> str | None:
        policy = self._caches.spec.policy
        if mask is None or not isinstance(policy, SizePolicy):
            return None
        if mask.dim() != 2 or not bool((mask.bool().int().diff(dim=1) >= 0).all()) or not bool(mask[:, -1].all()):
            return "the attention mask hides more than pads on the left"
        if bool(mask.all()):
            return None
        if behind_prefix:
            return "rows are padded behind a prefix"
        limit = policy.limit
        if self._caches.evicts and (limit is None or policy.keep(limit + 1) < limit):
            return "pads count towards the moment at which this policy trims, and on the device there are none"
        return None

    def settings(self, call: GenerateCall) -> GenerationSettings:
        """What the engine is to do; its ``unsupported_reason`` says what of the settings it cannot.

        Args:
            call: with all of its inputs.

        Raises:
            InputError: for what `generate` refuses.
        """
        with running(call.model, self._caches.geometry, lambda wanted: None) as run:
            return GenerationSettings.of(run.model, call.inputs, call.settings)

    def stream(
        self,
        call: GenerateCall,
        settings: GenerationSettings,
        generate: Callable[[GenerateCall], Any],
        *,
        behind_prefix: bool,
        backend: BackendName,
        chunk_size: int,
    ) -> Iterator[tuple[Tensor, CacheReport]]:
        """New tokens ``[rows, n]``, and the account of the cache.

        Args:
            call: as it was given.
            settings: what the engine is to do.
            generate: runs a call, which stands for the prefill: it makes one token.
            behind_prefix: whether a prefix comes before its inputs.
            backend: of the steps.
            chunk_size: tokens in a chunk.
        """

        def prefill() -> tuple[Tensor, Any, Sequence[Tensor], Tensor | None]:
            out = generate(prefill_of(call, settings))
            pads = None if behind_prefix else left_padding(call.mask)
            return out.logits[0], output_cache(out), list(out.sequences[:, :-1]), pads

        return self.decoder.chunks(prefill, settings, backend, chunk_size)
