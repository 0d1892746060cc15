"""What of a request's prefill its voice has computed before.

The conditioning at the beginning is the same for every text. With guidance (CFG) there is more: the unconditional row has
its text embeddings zeroed, so it depends on the text's length alone, and what a longer text computed begins with what a
shorter one needs. Both are kept as one prefix per voice and emotion: conditioning, then unconditional text. A request
then runs its own text in one row and the start of speech in both. The emotion is the last token of the conditioning, so
another emotion shares all before it.
"""

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kvcache import PrefixKey, PrefixSnapshot, SpeakerCache, model_fingerprint
from kvcache.cache import CacheSpec
from kvcache.models import cache_kwarg, geometry_of, kv_layers, new_cache, tensor_bytes, watch_of
from kvcache.prefixes import Layout, extend_prefix
from kvcache.prefixes.stores import Aside
from kvcache_chatterbox.checks import without_autocast
from kvcache_chatterbox.prefill import Prefill, condition

Reuse = Literal["all", "conditioning", "none"]

_CONDITIONINGS = 64
_PASSING = 2  # prefixes of what is no named voice; the same number is asked for again, or the next is another one
_STEP = 64  # unconditional texts are kept in multiples of so many tokens, so that processes agree on what to look for


@dataclass(frozen=True)
class FirstPass:
    """What the first forward pass of a request gives.

    Attributes:
        hidden: of the last position, ``[rows, dim]``.
        own: which of the pass's queries and keys are the conditional row's; None if all are, in order.
    """

    hidden: Tensor
    own: tuple[int, Tensor] | None = None


class VoiceReuse:
    """Prefills requests from what is known of their voices.

    Args:
        t3: upstream's T3.
        prefix_cache: where that lives.
        mode: ``"all"``; ``"conditioning"`` without the unconditional text.
    """

    def __init__(self, t3: Any, prefix_cache: SpeakerCache, mode: Reuse) -> None:
        self.prefix_cache = prefix_cache
        self._t3 = t3
        self._geometry = geometry_of(t3.tfmr)
        self._watch = watch_of(t3)  # held, so that whether the model has changed is cheap to ask
        self._conditionings: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._unconditional = mode == "all"
        self._passing: deque[PrefixSnapshot] = deque(maxlen=_PASSING)

    @property
    def usable(self) -> bool:
        """Whether the model, as it is now, can be told from others, so that what it computes may be kept.

        See `kvcache.models.Signature.why_no_name`.
        """
        return self._watch.signature().why_no_name is None

    @torch.inference_mode()
    def start(
        self, request: Prefill, cache: Any, known: Callable[[PrefixKey], PrefixSnapshot] | None = None
    ) -> FirstPass:
        """Prefill `request` into the empty `cache`.

        Args:
            known: gives the prefix of a key; by default the store does, or it is computed and stored.
        """
        with without_autocast(self._t3):
            return self._started(request, cache, self._known if known is None else known)

    def _started(self, request: Prefill, cache: Any, known: Callable[[PrefixKey], PrefixSnapshot]) -> FirstPass:
        rows, conditioning = request.embeds.shape[0], request.text[0]
        if rows == 2 and self._unconditional:
            return self._start_guided(request, cache, known)
        known(self._key(request.embeds[0, :conditioning])).to(self._t3.device).write_to(cache, rows)
        out = self._t3.tfmr(
            inputs_embeds=request.embeds[:, conditioning:], **cache_kwarg(self._t3.tfmr, cache), use_cache=True
        )
        return FirstPass(out[0][:, -1])

    def condition(self, t3_cond: Any) -> Tensor:
        """The voice as the beginning of the backbone's input, ``[1, tokens, dim]``; the last few are remembered, by content."""
        parts = [getattr(t3_cond, field.name) for field in dataclasses.fields(t3_cond)]
        content = [(p.dtype, p.shape, bytes(tensor_bytes(p))) if isinstance(p, Tensor) else p for p in parts]
        with without_autocast(self._t3):
            key = (model_fingerprint(self._t3), *content)
        known = self._conditionings.get(key)
        if known is None:
            known = self._conditionings[key] = condition(self._t3, t3_cond)
            while len(self._conditionings) > _CONDITIONINGS:
                self._conditionings.popitem(last=False)
        return known

    @torch.inference_mode()
    def key(self, t3_cond: Any, text: int = 1) -> PrefixKey:
        """The prefix that the requests of a voice share; with guidance, those whose text has about so many tokens."""
        conditioning = self.condition(t3_cond)[0]
        with without_autocast(self._t3):
            return self._key(conditioning, 0 if self._t3.is_gpt or not self._unconditional else text)

    @torch.inference_mode()
    def prepare(self, t3_cond: Any) -> PrefixSnapshot:
        """What the requests of a voice share, computed now unless it is known."""
        key = self.key(t3_cond)
        with without_autocast(self._t3):
            return self._known(key)

    def _key(self, conditioning: Tensor, unconditional: int = 0) -> PrefixKey:
        layout = Layout.of(geometry_of(self._t3.tfmr))  # of the model as it is now
        return PrefixKey(model_fingerprint(self._t3), self._content(conditioning, unconditional), layout)

    def _content(self, conditioning: Tensor, unconditional: int = 0) -> Tensor:
        """Of a conditioning ``[tokens, dim]``, and an unconditional text of at least so many tokens."""
        if unconditional:
            table = self._t3.text_pos_emb.emb.weight  # zeroed embeddings plus their positions: the positions
            tokens = min(-(-unconditional // _STEP) * _STEP, table.shape[0])
            conditioning = torch.cat([conditioning, table[:tokens]])
        return conditioning

    def _known(self, key: PrefixKey) -> PrefixSnapshot:
        return self.prefix_cache.get_or_extend(key, partial(self._extend, key))

    def passing(self, key: PrefixKey) -> PrefixSnapshot:
        """The prefix of what is no named voice, such as a number that a request gives.

        It is not stored; the last two are remembered here.
        """
        if (known := self._remembered(key)) is not None:
            return known
        found = self.prefix_cache.find(key)
        return found if found is not None and len(found) == len(key) else self.compute(key, found)

    def compute(self, key: PrefixKey, start: PrefixSnapshot | None, keep: Aside | None = None) -> PrefixSnapshot:
        """Compute a prefix from a known beginning of it, without asking a store.

        Args:
            keep: what stores it; by default it is only remembered here.
        """
        made = self.prefix_cache.compute(key, start, partial(self._extend, key))
        if keep is None:
            self._passing.append(made)
        else:
            keep.put(made)
        return made

    def _remembered(self, key: PrefixKey) -> PrefixSnapshot | None:
        return next((one.first(len(key)) for one in list(self._passing) if one.key.common(key) == len(key)), None)

    @torch.inference_mode()
    def _extend(self, key: PrefixKey, start: PrefixSnapshot | None) -> PrefixSnapshot:
        cache = self._cache(len(key))

        def run(rest: Tensor) -> None:
            self._t3.tfmr(inputs_embeds=rest, **cache_kwarg(self._t3.tfmr, cache), use_cache=True)

        return extend_prefix(run, key, start, cache, self._t3.device)

    def _start_guided(self, request: Prefill, cache: Any, known: Callable[[PrefixKey], PrefixSnapshot]) -> FirstPass:
        """Both rows in one pass over one row, side by side, each seeing its own: what they share is there once.

        ====================  ============  ==================  ===============  ===================
        keys                  conditioning  unconditional text  text, speech     speech
        ====================  ============  ==================  ===============  ===================
        known or new          known         known               new              new
        seen by               both          unconditional       conditional      unconditional
        ====================  ============  ==================  ===============  ===================
        """
        embeds, (conditioning, end), device = request.embeds, request.text, self._t3.device
        length, speech = embeds.shape[1], embeds.shape[1] - end
        own, new = length - conditioning, length - conditioning + speech
        beside = self._cache(end + new)
        key = self._key(embeds[1, :conditioning], end - conditioning)
        known(key).first(end).to(device).write_to(beside)

        sees = torch.zeros(new, end + new, dtype=torch.bool, device=device)
        sees[:, :conditioning] = True
        sees[own:, conditioning:end] = True
        sees[:own, end : end + own] = _causal(own, device)
        sees[own:, end + own :] = _causal(speech, device)
        mask = torch.zeros(sees.shape, dtype=embeds.dtype, device=device)
        mask.masked_fill_(~sees, torch.finfo(embeds.dtype).min)
        positions = torch.cat([torch.arange(conditioning, length), torch.arange(end, length)]).to(device)
        hidden = self._t3.tfmr(
            inputs_embeds=torch.cat([embeds[0, conditioning:], embeds[1, end:]])[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            **cache_kwarg(self._t3.tfmr, beside),
            use_cache=True,
        )[0][0]

        for i, layer in enumerate(kv_layers(beside)):
            assert layer.keys is not None and layer.values is not None
            cache.update(*(_pair(states, conditioning, end, own) for states in (layer.keys, layer.values)), i)
        keys = torch.cat([torch.arange(conditioning), torch.arange(end, end + own)]).to(device)
        return FirstPass(hidden[[own - 1, new - 1]], (own, keys))

    def _cache(self, tokens: int) -> Any:
        """For one row of so many tokens."""
        return new_cache(self._t3.tfmr, CacheSpec(max_length=tokens, static=True), rows=1, geometry=self._geometry)


class Prepared:
    """What is known of the voice of a request's utterances, for a thread that decodes and must not wait for a store.

    Args:
        reuse: of the model.
        key: what the longest of the utterances needs, see `VoiceReuse.key`.
        aside: of the store. It is asked here, once.
        kept: whether what is computed is stored.
    """

    def __init__(self, reuse: VoiceReuse, key: PrefixKey, aside: Aside, kept: bool) -> None:
        self._reuse, self._key, self._aside, self._kept = reuse, key, aside, kept
        self._known = reuse._remembered(key) or aside.find(key)

    def __call__(self, key: PrefixKey) -> PrefixSnapshot:
        """The prefix of one of the utterances, computed for all of them if it is not known."""
        wanted = self._key if self._key.common(key) == len(key) else key  # of the model as it is now
        start, common = self._known, self._common(self._known, key)
        if common < len(key):
            for other in (self._aside.pending(wanted), self._reuse._remembered(wanted)):  # others may have computed it
                if self._common(other, wanted) > common:
                    start, common = other, self._common(other, wanted)
        if start is None or common < len(key):
            start = None if start is None or common == 0 else start.first(common)
            start = self._known = self._reuse.compute(wanted, start, self._aside if self._kept else None)
        return start.first(len(key))

    @staticmethod
    def _common(known: PrefixSnapshot | None, key: PrefixKey) -> int:
        return 0 if known is None else known.key.common(key)


def _causal(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _pair(states: Tensor, conditioning: int, end: int, own: int) -> Tensor:
    """The conditional and the unconditional row, one below the other, from one row in which they lie side by side."""
    pair = states.new_empty(2, states.shape[1], conditioning + own, states.shape[3])
    pair[0, :, :conditioning] = states[0, :, :conditioning]
    pair[0, :, conditioning:] = states[0, :, end : end + own]
    pair[1, :, :end] = states[0, :, :end]
    pair[1, :, end:] = states[0, :, end + own :]
    return pair
