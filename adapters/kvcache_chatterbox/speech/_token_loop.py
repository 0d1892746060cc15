"""T3's token loop: prefill, then one token at a time, on a managed cache or recomputed from the start."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcache.decoding import Sampling
from kvcache.models import cache_kwarg, onednn_linear
from kvcache_chatterbox.checks import without_autocast
from kvcache_chatterbox.prefill import Prefill, embed_speech
from kvcache_chatterbox.speech._alignment import (
    ALIGNMENT,
    AlignmentNote,
    AlignmentRule,
    HeadReader,
    aligned_heads,
    first_look,
    is_checked,
)
from kvcache_chatterbox.speech._ending import Ending, speech_end
from kvcache_chatterbox.speech._sampling import draw, processors
from kvcache_chatterbox.voices import FirstPass


class Decoder:
    """One request on a T3 model.

    Args:
        t3: upstream's T3.
        request: its prefill.
        sampling: how tokens are drawn.
        max_new_tokens: how many at most.
        cache: what to pass as `past_key_values`; None recomputes everything at every token.
        generator: of the draws; None takes torch's global one, as upstream does.
        start: prefills the request into the cache, from what is known of its voice; None runs all of it.
        onednn: let oneDNN multiply where it is faster, see `kvcache.models.onednn_linear`.

    Attributes:
        prefix: tokens before the speech.
        ending: how near its end the request is.
    """

    def __init__(
        self,
        t3: Any,
        request: Prefill,
        sampling: Sampling,
        max_new_tokens: int,
        cache: Any,
        generator: torch.Generator | None,
        start: Callable[[Prefill, Any], FirstPass] | None = None,
        onednn: bool = True,
    ) -> None:
        self._t3 = t3
        self._cfg_weight = sampling.cfg_weight
        self._greedy = sampling.greedy
        self._processors = processors(sampling, t3.is_gpt)
        self._cache = cache
        self._generator = generator
        self._pending = request.embeds  # what the next forward pass runs
        self.prefix = request.embeds.shape[1]
        self._start = None if start is None else partial(start, request, cache)
        self._onednn = onednn
        self._text = request.text
        self._reader = HeadReader(t3.tfmr, aligned_heads(t3)) if is_checked(t3) else None
        self._rule: AlignmentRule | None = None
        self._own: tuple[int, Tensor] | None = None
        self.ending = Ending(speech_end(t3, max_new_tokens))
        self._ids = torch.full((1, max_new_tokens + 1), t3.hp.start_speech_token, device=t3.device)

    def tokens(self) -> Iterator[Tensor]:
        """The speech tokens ``[1]`` as they are drawn, up to the utterance's `ending`."""
        for made in range(self.ending.end.most):
            with without_autocast(self._t3):
                token = self._step(made)
            said = self.ending.take(token.reshape(1))
            if said.numel():
                yield said
            if self.ending.over:
                return

    # Decorated here and not around the loop: a suspended generator would leave its caller in inference mode.
    @torch.inference_mode()
    def _step(self, made: int) -> Tensor:
        logits = self._logits(made)
        # The GPT-2 loop penalizes the start token only as long as there is nothing else.
        drawn = self._ids[:, 1 if self._t3.is_gpt and made else 0 : made + 1]
        for processor in self._processors:
            logits = processor(drawn, logits)
        token = logits.argmax(-1, keepdim=True) if self._greedy else draw(logits, self._generator)
        self._ids[:, made + 1 : made + 2] = token
        if self._rule is not None:
            self._rule.drew(token[:, 0])
        embeds = embed_speech(self._t3, token, made + 1).expand(self._pending.shape[0], -1, -1)
        self._pending = embeds if self._cache is not None else torch.cat([self._pending, embeds], dim=1)
        return token

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Run what the request starts from. The logits of the last position, ``[rows, vocabulary]``."""
        with without_autocast(self._t3):
            return torch.as_tensor(self._t3.speech_head(self._run(0).hidden))

    @property
    def notes(self) -> dict[str, AlignmentNote]:
        """What the rules of a sampler have to know of the request, once it is prefilled."""
        if self._reader is None:
            return {}
        return {ALIGNMENT: first_look(list(self._reader.weights.values()), self._text, self._own)}

    def _run(self, made: int) -> FirstPass:
        reading = nullcontext() if self._reader is None else self._reader.reading()
        rows = None if made == 0 else self._pending.shape[0] * self._pending.shape[1]
        with reading, onednn_linear(self._t3.tfmr, rows) if self._onednn else nullcontext():
            out = self._start() if self._start is not None and made == 0 else self._forward()
        self._own = out.own
        return out

    def _logits(self, made: int) -> Tensor:
        """Of the last position, guided and checked, ``[1, vocabulary]``."""
        out = self._run(made)
        logits: Tensor = self._t3.speech_head(out.hidden)
        if logits.shape[0] == 2:
            conditional, unconditional = logits[0:1], logits[1:2]
            weight = torch.as_tensor(self._cfg_weight, device=logits.device, dtype=logits.dtype)
            logits = conditional + weight * (conditional - unconditional)
        if self._reader is not None:
            logits = self._checked(self._reader, logits, made)
        return logits

    def _checked(self, reader: HeadReader, logits: Tensor, made: int) -> Tensor:
        if self._rule is None:
            begin, end = self._text
            self._rule = AlignmentRule.of(self._t3, 1, end - begin, self.ending.end.most)
        if made == 0:
            self._rule.begin(0, self.notes[ALIGNMENT])
        else:
            self._rule.look([weights[-1:] for weights in reader.weights.values()])
        return self._rule.scores(logits)

    def _forward(self) -> FirstPass:
        caching = self._cache is not None
        out = self._t3.tfmr(inputs_embeds=self._pending, **cache_kwarg(self._t3.tfmr, self._cache), use_cache=caching)
        return FirstPass(out[0][:, -1])
